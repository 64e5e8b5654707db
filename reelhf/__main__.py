"""`python -m reelhf`, `torchrun -m reelhf` and `deepspeed --module reelhf`."""

from reelhf.cli import main

if __name__ == "__main__":
    main()
