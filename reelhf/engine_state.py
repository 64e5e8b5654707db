"""Weights and AdamW moments on disk, independent of how many processes wrote them.

Each process writes the pieces that ZeRO gave it, under the names of the parameters and the offset within each; each reads, from
any files, the pieces that it has now. Nothing is gathered, nothing converted, and float32 values come back bit for bit.

    index.json                 shapes of the trained parameters, the ZeRO stage
    pieces_rank_000.safetensors    "<kind>|<offset>|<name>" -> flat float32 piece; kind is weight, exp_avg or exp_avg_sq
    rest.safetensors           frozen parameters and buffers
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelhf.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
INDEX = "index.json"
REST = "rest.safetensors"
MAX_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Piece:
    """What this process holds of one parameter: a flat range, and where its values live."""

    offset: int
    weight: Tensor
    """Flat view of the float32 weights; writing to it changes them."""
    owner: Tensor
    """The tensor that the optimizer keeps moments of."""
    start: int
    """Of the piece within the owner."""

    def moment(self, state: Mapping[str, Tensor], kind: str) -> Tensor:
        return state[kind].view(-1).narrow(0, self.start, len(self.weight))


class EngineState:
    """Reads and writes the state of one DeepSpeed engine with AdamW.

    Args:
        engine: DeepSpeed's; adamw: the optimizer inside it.
        trained: parameters by name.
        shapes: of those parameters, taken before ZeRO-3 empties them.
    """

    def __init__(
        self,
        engine: Any,
        adamw: torch.optim.Optimizer,
        trained: dict[str, nn.Parameter],
        shapes: dict[str, list[int]],
        zero_stage: int,
    ) -> None:
        self.engine, self.adamw, self.trained = engine, adamw, trained
        self.shapes, self.zero_stage = shapes, zero_stage

    def save(self, folder: Path, rest: dict[str, Tensor], rank: int) -> None:
        """Write this process's part; rank 0 also writes the index and `rest`."""
        from safetensors.torch import save_file

        pieces: dict[str, Tensor] = {}
        steps: dict[str, float] = {}
        for name, piece in self._pieces():
            state = self.adamw.state.get(piece.owner, {})
            held = {"weight": piece.weight}
            if "step" in state:
                held |= {kind: piece.moment(state, kind) for kind in MOMENTS}
                steps[name] = float(state["step"])
            for kind, values in held.items():
                pieces[f"{kind}|{piece.offset}|{name}"] = values.detach().float().cpu().clone()
        if self.zero_stage or rank == 0:  # without ZeRO every process holds everything
            save_file(
                pieces,
                folder / f"pieces_rank_{rank:03d}.safetensors",
                metadata={"steps": json.dumps(steps)},
            )
        if rank == 0:
            index = {"zero_stage": self.zero_stage, "parameters": self.shapes}
            (folder / INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")
            save_file({name: t.detach().cpu().clone() for name, t in rest.items()}, folder / REST)

    def load(self, folder: Path) -> dict[str, Tensor]:
        """Restore weights and moments; returns what `save` was given as `rest`.

        Raises: UserError if the checkpoint is of another architecture, or a part of it is missing.
        """
        from safetensors import safe_open
        from safetensors.torch import load_file

        self._check(folder)
        files = [
            safe_open(file, framework="pt")
            for file in sorted(folder.glob("pieces_rank_*.safetensors"))
        ]
        held: dict[str, list[tuple[int, Any, str]]] = {}  # kind|name -> (offset, file, key)
        steps: dict[str, float] = {}
        for file in files:
            steps |= json.loads(file.metadata()["steps"])
            for key in file.keys():  # noqa: SIM118, a handle, not a dict
                kind, offset, name = key.split("|", 2)
                held.setdefault(f"{kind}|{name}", []).append((int(offset), file, key))
        self._make_moments(
            {id(piece.owner): 0.0 for name, piece in self._pieces() if name in steps}
        )
        for name, piece in self._pieces():
            _fill(piece.weight, piece.offset, held, f"weight|{name}", folder)
            if name in steps:
                state = self.adamw.state[piece.owner]
                state["step"].fill_(steps[name])
                for kind in MOMENTS:
                    _fill(piece.moment(state, kind), piece.offset, held, f"{kind}|{name}", folder)
        self._refresh_working_copies()
        return load_file(folder / REST)

    def _check(self, folder: Path) -> None:
        saved: dict[str, list[int]] = json.loads((folder / INDEX).read_text())["parameters"]
        lacking = [name for name in self.shapes if name not in saved]
        unknown = [name for name in saved if name not in self.shapes]
        other = [
            f"{name} {saved[name]} there, {shape} here"
            for name, shape in self.shapes.items()
            if name in saved and saved[name] != shape
        ]
        found = [
            f"{label} {_listing(names)}"
            for label, names in (
                ("it lacks", lacking),
                ("it has besides", unknown),
                ("other shapes:", other),
            )
            if names
        ]
        if found:
            raise UserError(
                f"{folder} is a checkpoint of another architecture: {'; '.join(found)}; "
                "resume with the architecture it was made with, or choose another --out"
            )

    def _make_moments(self, owners: Mapping[int, float]) -> None:
        """AdamW makes its state at its first step; a fresh engine has none yet."""
        for _, piece in self._pieces():
            state = self.adamw.state[piece.owner]
            if id(piece.owner) in owners and "step" not in state:
                state["step"] = torch.tensor(0.0)
                for kind in MOMENTS:
                    state[kind] = torch.zeros_like(piece.owner, memory_format=torch.preserve_format)

    def _pieces(self) -> Iterator[tuple[str, Piece]]:
        """This process's part of every trained parameter, by where DeepSpeed keeps float32 weights at each stage."""
        optimizer = self.engine.optimizer
        parameter: Any  # DeepSpeed writes attributes on it
        for name, parameter in self.trained.items():
            if hasattr(
                parameter, "ds_id"
            ):  # ZeRO-3: equal parts of each parameter, the last one padded
                group, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
                flat = optimizer.fp32_partitioned_groups_flat[group]
                offset = length * torch.distributed.get_rank()
                length = min(length, parameter.ds_numel - offset)
            elif hasattr(
                parameter, "_hp_mapping"
            ):  # ZeRO-1 and 2: equal parts of all parameters in a row
                mapping = parameter._hp_mapping
                if mapping is None:
                    continue
                groups = (
                    getattr(optimizer, "single_partition_of_fp32_groups", None)
                    or optimizer.fp32_groups_flat_partition
                )
                flat = groups[mapping.param_group_index]
                start = mapping.hp_fragment_address.start
                length = mapping.hp_fragment_address.numel
                offset = mapping.lp_fragment_address.start
            else:  # no ZeRO
                flat, start, length, offset = parameter, 0, parameter.numel(), 0
            if length > 0:
                yield name, Piece(offset, flat.data.view(-1).narrow(0, start, length), flat, start)

    def _refresh_working_copies(self) -> None:
        """The weights that the forward pass reads, from the float32 ones."""
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            for full, working in zip(
                optimizer.fp32_partitioned_groups_flat,
                optimizer.fp16_partitioned_groups_flat,
                strict=True,
            ):
                working.data.copy_(full.data)
            kept_whole = optimizer.persistent_parameters
            if kept_whole:
                kept_whole[0].all_gather(kept_whole)
        elif hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()


def _fill(
    target: Tensor,
    offset: int,
    held: Mapping[str, list[tuple[int, Any, str]]],
    name: str,
    folder: Path,
) -> None:
    """Copy what the files hold of [offset, offset + len(target)) into the target."""
    filled = 0
    for start, file, key in held.get(name, []):
        values = file.get_slice(key)
        low = max(offset, start)
        high = min(offset + len(target), start + values.get_shape()[0])
        if low < high:
            target[low - offset : high - offset].copy_(values[low - start : high - start])
            filled += high - low
    if filled != len(target):
        kind, parameter = name.split("|", 1)
        raise UserError(
            f"{folder} is incomplete: {filled} of {len(target)} values of {parameter} ({kind}) are there; restore or delete it"
        )


def _listing(names: list[str]) -> str:
    rest = len(names) - MAX_NAMES_SHOWN
    return ", ".join(names[:MAX_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
