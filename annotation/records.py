"""The records that cross folders: what is asked, what is answered, and the preference data that comes out.

Preference data is one folder (contract 3 of the design): `clips`, `judgments` and `preferences` as Parquet (or JSONL) and a
`manifest.json` with the schema version, row counts and sha256 of each table. `write_preferences` and `read_preferences` are the
only code that touches those files.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reelhf.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

PREFERENCE_SCHEMA = "reelhf.preferences"
PREFERENCE_SCHEMA_VERSION = 1
"""Raised whenever a column changes its name, type or meaning; a reader refuses any other version."""

DIMENSIONS: tuple[str, ...] = (
    "prompt_following",
    "motion_quality",
    "aesthetic_quality",
    "structural_stability",
    "preservation",  # image-to-video only
)

STATUSES = ("ok", "tie", "cannot_judge", "no_valid_pair")
KINDS = ("best_worst", "gsb", "score")
"""What is asked of a task: best and worst clip, the better one of a pair (good, same, bad), or 1 to 5 for each clip."""
PURPOSES = ("work", "gold", "practice", "exam")
"""Why a task is there: to be judged, or because its answer is known."""
SCORES = (1, 2, 3, 4, 5)
LANGUAGES = ("en", "zh")
"""What the page and the questions can be read in."""
LETTERS = "ABCDEFGH"
MIN_CLIPS, MAX_CLIPS = 2, len(LETTERS)


# --- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """The words an annotator reads for one dimension."""

    dimension: str
    label: str
    question: str
    help: str
    applies_to: tuple[str, ...]
    translations: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Language -> label, question, help."""


@dataclass(frozen=True)
class Guideline:
    """One version of all questions."""

    version: str
    questions: Mapping[str, Question]
    guide: Mapping[str, str] = field(default_factory=dict)
    """Language -> how to judge, in Markdown; annotators open it beside the task."""

    def dimensions(self, task_kind: str) -> tuple[str, ...]:
        """Names of the dimensions asked for `t2v` or `i2v`, in the file's order."""
        return tuple(name for name, q in self.questions.items() if task_kind in q.applies_to)


@lru_cache(maxsize=4)
def load_guideline(path: Path | None = None) -> Guideline:
    """Reads the question texts (default: `annotation/questions.yaml`). Raises UserError on a file that names no dimension."""
    import yaml

    path = path or Path(__file__).with_name("questions.yaml")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        questions = {
            name: Question(
                name,
                body["label"],
                body["question"],
                body.get("help", ""),
                tuple(body["applies_to"]),
                {
                    language: {key: body[language][key] for key in ("label", "question", "help")}
                    for language in LANGUAGES
                    if language in body
                },
            )
            for name, body in raw["dimensions"].items()
        }
        version = str(raw["version"])
        guide = {language: str(text) for language, text in raw.get("guide", {}).items()}
    except (OSError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: not a question file (needs `version` and `dimensions`): {error!r}"
        ) from error
    unknown = [name for name in questions if name not in DIMENSIONS]
    if unknown:
        raise UserError(
            f"{path} asks about {', '.join(unknown)}; the dimensions are {', '.join(DIMENSIONS)}"
        )
    return Guideline(version, questions, guide)


@dataclass(frozen=True)
class PromptRecord:
    """One prompt. `prompt_id` is a hash of the normalised text, so it is the same in every round and project."""

    text: str
    language: str = "en"
    prompt_id: str = ""

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise UserError("a prompt is empty")
        if not self.prompt_id:
            object.__setattr__(self, "prompt_id", prompt_id(self.text))


@dataclass(frozen=True)
class ClipRecord:
    """One clip as a caller hands it in. The store measures sha256, size, frames and fps itself."""

    path: Path
    prompt: str
    model: str
    stage: str
    """Which model made it: `base`, `refiner`, `base_early`, `corruption:blur`, ... never shown to annotators."""
    language: str = "en"
    task_kind: str = "t2v"
    first_frame: Path | None = None
    """The picture an image-to-video clip started from."""
    checkpoint: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ClipView:
    """One clip as an annotator sees it: a letter and an opaque address."""

    letter: str
    url: str


@dataclass(frozen=True)
class TaskView:
    """One task as an annotator sees it. Names neither the models nor the stages."""

    presentation: str
    """Opaque token of this showing of the task to this annotator."""
    prompt: str
    language: str
    task_kind: str
    dimensions: tuple[str, ...]
    """In the order asked, which is random per showing."""
    questions: Mapping[str, Question]
    clips: tuple[ClipView, ...]
    """In the order shown, which is random per showing; `Choice` counts in this order from 0."""
    first_frame_url: str | None
    fps: float
    """Of the copies that are shown; all clips of a task share it."""
    num_frames: int
    guideline_version: str
    lease_seconds: float
    kind: str = "best_worst"
    purpose: str = "work"
    """`work`, `practice`, `exam` or `adjudication`; a hidden gold task or re-test is shown as `work`."""
    opinions: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Only when adjudicating: dimension -> what the annotators said, nameless, in this showing's order of clips."""
    draft: str | None = None
    """What the page last saved of this showing's answers, if they are half-finished."""

    @property
    def num_clips(self) -> int:
        return len(self.clips)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> TaskView:
        questions = {
            name: Question(**{**q, "applies_to": tuple(q["applies_to"])})
            for name, q in raw["questions"].items()
        }
        return cls(
            **{
                **raw,
                "dimensions": tuple(raw["dimensions"]),
                "questions": questions,
                "clips": tuple(ClipView(**c) for c in raw["clips"]),
            }
        )


# --- what is answered ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """One annotator's answer in one dimension. Clips are indices in the order shown, from 0.

    `first_best`, `first_worst`: the pair as the annotator made it freely, before the admissibility rule touched it. Always
    stored. Left out, they equal `best` and `worst` (a pick that was never vetoed); a `constrained` or `no_valid_pair` answer
    must state them.
    """

    dimension: str
    best: int | None = None
    worst: int | None = None
    status: str = "ok"
    """`ok`, `tie`, `cannot_judge`, or `no_valid_pair` (the free pick was vetoed and no other pair would be honest)."""
    first_best: int | None = None
    first_worst: int | None = None
    constrained: bool = False
    """The pair was chosen after a veto, so it is not the annotator's free opinion."""
    confirmed: bool | None = None
    """Answer to "is your best not worse than your worst in any other dimension?"; None if it was not asked. False keeps the pair
    out of what is admissible."""
    scores: tuple[int, ...] | None = None
    """Kind `score`: 1 (bad) to 5 (excellent) for each clip."""

    def with_first(self) -> Choice:
        """The same answer with the free pick filled in where it is the answer itself."""
        if self.status == "ok" and not self.constrained:
            return replace(self, first_best=self.best, first_worst=self.worst)
        return self


@dataclass(frozen=True)
class Verdict:
    """One annotator's answer to one task: a `Choice` per dimension."""

    choices: tuple[Choice, ...]
    note: str = ""
    seconds: float | None = None
    """Time from showing to submitting as the annotator's side measured it."""
    watched_seconds: tuple[float | None, ...] = ()
    """Play time per clip in the order shown, if known; None of a clip that does not play in that browser."""
    language: str = "en"
    """In which the questions were read."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# --- text of prompts -------------------------------------------------------------------------------------------------


def normalise_prompt(text: str) -> str:
    """Case, width, punctuation and spacing removed; what stays decides whether two prompts are the same prompt."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w]+", " ", text).split())


def prompt_id(text: str) -> str:
    """Stable name of a prompt: `p` and 16 hex digits of the sha256 of its normalised text."""
    return "p" + hashlib.sha256(normalise_prompt(text).encode()).hexdigest()[:16]


SPLIT_SALT = "reelhf-split-1"
SPLIT_FRACTIONS = {"train": 0.7, "validation": 0.1, "test": 0.2}


def split_of(cluster: str, *, salt: str = SPLIT_SALT) -> str:
    """Split of a near-duplicate prompt cluster: a salted hash, so it never depends on the round or on other prompts."""
    draw = int.from_bytes(hashlib.sha256(f"{salt}:{cluster}".encode()).digest()[:8], "big") / 2**64
    for name, fraction in SPLIT_FRACTIONS.items():
        if draw < fraction:
            return name
        draw -= fraction
    return "test"


# --- preference data on disk -----------------------------------------------------------------------------------------

TABLES = ("clips", "judgments", "preferences")


def preference_schemas() -> dict[str, pa.Schema]:
    import pyarrow as pa

    text, integer, number, flag = pa.string(), pa.int64(), pa.float64(), pa.bool_()
    when = pa.timestamp("ms", tz="UTC")

    def required(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, kind, nullable=False)

    return {
        "clips": pa.schema(
            [
                required("sha256", text),
                required("uri", text),  # relative to the folder, or absolute
                required("project", text),
                required("prompt_id", text),
                required("prompt", text),
                required("language", text),
                required("task_kind", text),  # t2v | i2v
                pa.field("first_frame_sha256", text),
                pa.field("first_frame_uri", text),
                required("model", text),
                required("stage", text),
                pa.field("checkpoint", text),
                pa.field("seed", integer),
                required("fps", number),
                required("num_frames", integer),
                required("width", integer),
                required("height", integer),
            ]
        ),
        "judgments": pa.schema(
            [
                required("judgment_id", text),  # one per annotator x task x dimension x pick
                required("task_id", text),
                required("annotator", text),  # pseudonym
                required("simulated", flag),
                required("project", text),
                required("round", integer),
                required("prompt_id", text),
                required("dimension", text),
                required("kind", text),  # best_worst | gsb | score
                required("candidates", pa.list_(text)),  # sha256 in the order shown
                required(
                    "pick", text
                ),  # first: a free pick that was vetoed | final: what was submitted
                required("status", text),  # ok | tie | cannot_judge | no_valid_pair | vetoed
                pa.field("best", integer),  # index into candidates
                pa.field("worst", integer),
                required("tie", flag),
                pa.field("scores", pa.list_(number)),  # kind score: one per candidate
                required("admissible", flag),
                required("constrained", flag),
                required("dimension_position", integer),  # 0 = asked first
                required(
                    "surplus", flag
                ),  # arrived after the asked number of judgments was reached
                pa.field("shown_at", when),
                required("submitted_at", when),
                pa.field("seconds", number),
                required("guideline_version", text),
                pa.field("purpose", text),  # work | gold | retest | adjudication
                pa.field(
                    "revision", integer
                ),  # how often the annotator changed it; the latest is here
                pa.field(
                    "confirmed", flag
                ),  # "best is not worse than worst elsewhere": their answer
            ]
        ),
        "preferences": pa.schema(
            [
                required("prompt_id", text),
                required("prompt", text),
                required("language", text),
                required("task_kind", text),
                pa.field("first_frame_sha256", text),
                required("task_id", text),
                required("round", integer),
                required("dimension", text),
                required("clip_a", text),  # sha256; which of the two is a is random
                required("clip_b", text),
                required("preference", integer),  # +1: a, -1: b, 0: tie
                required("kind", text),  # explicit | implied
                required("weight", number),
                required("judgment_ids", pa.list_(text)),
                required("annotator", text),
                required("simulated", flag),
                required(
                    "admissible", flag
                ),  # false: may teach this dimension's head, never the composite or DPO
                required("constrained", flag),
                required("same_stage", flag),
                pa.field(
                    "agreement", number
                ),  # fraction of the other judgments of this pair that say the same
                required("split", text),  # train | validation | test
            ]
        ),
    }


@dataclass(frozen=True)
class PreferenceData:
    """Preference data in memory: each table as a list of rows (dicts keyed by column; timestamps are aware datetimes)."""

    folder: Path
    clips: list[dict[str, Any]]
    judgments: list[dict[str, Any]]
    preferences: list[dict[str, Any]]
    manifest: dict[str, Any] = field(default_factory=dict)

    def clip_path(self, sha256: str) -> Path:
        """Where the clip's file lies. Raises UserError if the table does not name it."""
        if sha256 not in self._uris:
            raise UserError(
                f"{self.folder}: no clip {sha256} in the clips table ({len(self.clips)} clips)"
            )
        return Path(os.path.abspath(self.folder / self._uris[sha256]))  # an absolute one stays

    @functools.cached_property
    def _uris(self) -> dict[str, str]:
        return {clip["sha256"]: clip["uri"] for clip in self.clips}


def write_preferences(
    folder: Path,
    *,
    clips: Iterable[Mapping[str, Any]],
    judgments: Iterable[Mapping[str, Any]],
    preferences: Iterable[Mapping[str, Any]],
    guideline_version: str,
    source_query: str,
    fmt: str = "parquet",
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the three tables and then the manifest; a folder without a manifest is an export that never finished.

    Args:
        fmt: `parquet`, `jsonl` or `csv` (`annotation.preference_files`).
        extra: further manifest entries.
    Returns: the folder.
    """
    from annotation.preference_files import PreferenceWriter

    with PreferenceWriter(folder, fmt=fmt) as writer:
        for name, rows in zip(TABLES, (clips, judgments, preferences), strict=True):
            writer.write(name, rows)
        return writer.finish(
            guideline_version=guideline_version, source_query=source_query, extra=extra
        )


def read_preferences(folder: Path | str, *, tables: Sequence[str] = TABLES) -> PreferenceData:
    """Reads preference data after checking its schema version and the hash of every table.

    Args:
        tables: the tables wanted; the others come back empty.
    Raises: UserError naming what is missing, cut short, or of another version.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(folder)
    manifest_path = folder / "manifest.json"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{folder} is not preference data: cannot read manifest.json ({error.strerror}). `reelhf annotate export` writes it"
        ) from error
    except ValueError as error:
        raise UserError(f"{manifest_path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != PREFERENCE_SCHEMA:
        raise UserError(
            f"{manifest_path} is not a preference manifest (`schema` should be {PREFERENCE_SCHEMA!r})"
        )
    version = manifest.get("schema_version")
    if version != PREFERENCE_SCHEMA_VERSION:
        raise UserError(
            f"{folder} has preference schema version {version!r}; this program reads version {PREFERENCE_SCHEMA_VERSION}. Export it again"
        )
    fmt = manifest.get("format", "parquet")
    if fmt == "csv":
        raise UserError(f"{folder} is CSV, which is to look at; export it as parquet or jsonl")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    for name in tables:
        path = folder / f"{name}.{fmt}"
        expected = manifest.get("files", {}).get(path.name)
        if expected is None:
            raise UserError(f"{manifest_path} does not list {path.name}")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} is missing: {error.strerror}") from error
        if len(data) != expected["bytes"]:
            raise UserError(
                f"{path} has {len(data)} bytes where its manifest says {expected['bytes']}: cut short?"
            )
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise UserError(
                f"{path} does not match the sha256 in its manifest: it was changed after the export"
            )
        if fmt == "jsonl":
            rows[name] = [
                _parse_times(json.loads(line)) for line in data.decode("utf-8").splitlines()
            ]
        else:
            rows[name] = pq.read_table(pa.BufferReader(data)).to_pylist()
    return PreferenceData(folder=folder, manifest=manifest, **rows)


def _parse_times(row: dict[str, Any]) -> dict[str, Any]:
    for key in ("shown_at", "submitted_at"):
        if row.get(key) is not None:
            row[key] = datetime.fromisoformat(row[key])
    return row
