"""Pre-training of the aesthetic model: image-text contrast, and less against more spoiled pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelhf.graded import GradedClips
from rewards.aesthetic import AestheticReward
from rewards.pretraining.batches import batches
from rewards.pretraining.config import PretrainConfig
from rewards.pretraining.muon import CosineMuon
from rewards.pretraining.pairs import generated_clips, graded_pairs, ranking_loss, spoiled_pair
from rewards.tokens import encode_texts, pad_right


class TextTower(nn.Module):
    """A tiny SigLIP text encoder: token ids -> one embedding [B, H]."""

    def __init__(
        self, *, vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, max_tokens: int
    ) -> None:
        from transformers import SiglipTextConfig, SiglipTextModel

        super().__init__()
        self.encoder = SiglipTextModel(
            SiglipTextConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                intermediate_size=2 * hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                max_position_embeddings=max_tokens,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        nn.init.normal_(self.encoder.embeddings.position_embedding.weight, std=0.02)
        nn.init.normal_(self.encoder.embeddings.token_embedding.weight, std=0.5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return (states * mask[..., None]).sum(1) / mask.sum(
            1, keepdim=True
        )  # mean over the real tokens


def pretrain_aesthetic(
    model: AestheticReward,
    config: PretrainConfig,
    frames: Tensor,
    captions: list[str],
    graded: Sequence[GradedClips] = (),
) -> None:
    """Sigmoid image-text contrast (SigLIP, 2303.15343) and the head's ranking of spoiled pictures."""
    generator = torch.Generator().manual_seed(config.seed + 2)
    size = model.backbone.config.hidden_size
    text = TextTower(
        vocab_size=len(model.tokenizer),
        hidden_size=size,
        num_layers=1,
        num_heads=config.aesthetic.num_heads,
        max_tokens=config.aesthetic.max_text_tokens,
    )
    project = nn.Linear(2 * size, size)
    scale = nn.Parameter(torch.tensor([math.log(10.0), -5.0]))  # log temperature and bias
    modules = nn.ModuleDict({"model": model, "text": text, "project": project})
    modules.register_parameter("scale", scale)
    optimizer = CosineMuon(modules, config.aesthetic_stage)
    limit = config.aesthetic.max_text_tokens
    prompts = encode_texts(model.tokenizer, captions, max_tokens=limit)
    model.train()
    stage = config.aesthetic_stage
    judged = graded_pairs(graded, model, stage.batch_size, generator)
    texts = [encode_texts(model.tokenizer, clips.captions, max_tokens=limit) for clips in graded]
    own = generated_clips(graded, texts, stage.batch_size, generator)
    for step, batch in enumerate(batches(frames, stage, generator, "pre-train aesthetic")):
        which = int(torch.randint(frames.shape[2], (), generator=generator))
        pair = next(judged, None) if step % 2 else None
        if pair is None:
            source = next(own, None) if step % 4 == 0 else None
            right = [prompts[i] for i in batch.index.tolist()]
            clips, right = (batch.frames, right) if source is None else source
            picture = clips[:, :, which : which + 1]
            less, more, margin = spoiled_pair(picture, "aesthetic_quality", generator)
        else:
            right, margin = pair.prompts, pair.margin
            less, more = (clip[:, :, which : which + 1] for clip in (pair.nearer, pair.further))
        features = model.features(torch.cat([less, more]).squeeze(2))
        score = model.head(features)[:, 0]
        first, second = score.chunk(2)
        image = F.normalize(project(features.chunk(2)[0]), dim=1)
        ids, mask = pad_right(right, model.tokenizer.pad_token_id)
        words = F.normalize(text(ids, mask), dim=1)
        logits = image @ words.T * scale[0].exp() + scale[1]
        sign = 2 * torch.eye(len(logits)) - 1
        contrast = -F.logsigmoid(sign * logits).sum(1).mean()
        optimizer.step(0.3 * contrast + ranking_loss(first, second, margin))
