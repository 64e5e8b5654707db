"""How each reward backbone is pre-trained on captioned clips; `rewards.pretrain` is the door."""
