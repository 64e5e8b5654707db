"""What Label Studio shows for a best/worst task, and how its answers read as ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from annotation.records import LETTERS, Choice, Guideline, Verdict
from annotation.refusals import Refused

BEST, WORST, OTHER, NOTE = "best__", "worst__", "other__", "note"
OTHER_CHOICES = ("tie", "cannot_judge")


def label_config(guideline: Guideline, dimensions: Sequence[str], num_clips: int) -> str:
    """The project's XML: the prompt, K videos that play together, and best, worst or neither per dimension.

    Choices hang on the prompt because in Label Studio they may name one object only.
    """
    videos = "\n".join(
        f'    <View><Header value="{letter}"/>'
        f'<Video name="video_{letter}" value="$video_{letter}" sync="clips" frameRate="$fps"/></View>'
        for letter in LETTERS[:num_clips]
    )
    rows = "\n".join(_row(guideline, name, num_clips) for name in dimensions)
    columns = min(num_clips, 2)
    return f"""<View>
  <Text name="prompt" value="$prompt"/>
  <View style="display: grid; grid-template-columns: repeat({columns}, 1fr); gap: 8px">
{videos}
  </View>
{rows}
  <TextArea name="{NOTE}" toName="prompt" placeholder="Note (optional)" maxSubmissions="1"/>
</View>"""


def _row(guideline: Guideline, dimension: str, num_clips: int) -> str:
    question = guideline.questions[dimension]
    letters = "".join(f'<Choice value="{letter}"/>' for letter in LETTERS[:num_clips])
    others = "".join(f'<Choice value="{name}"/>' for name in OTHER_CHOICES)

    def control(prefix: str, hint: str, choices: str) -> str:
        return (
            f'    <Header value={quoteattr(hint)} size="6"/>'
            f'<Choices name="{prefix}{dimension}" toName="prompt" choice="single-radio" showInline="true">'
            f"{choices}</Choices>"
        )

    return "\n".join(
        (
            "  <View>",
            f'    <Header value={quoteattr(f"{question.label}: {question.question}")} size="5"/>',
            control(BEST, "best", letters),
            control(WORST, "worst", letters),
            control(OTHER, "or", others),
            "  </View>",
        )
    )


def task_data(
    *,
    uid: str,
    prompt: str,
    order: Sequence[int],
    urls: Sequence[str],
    fps: float,
    guideline_version: str,
) -> dict[str, Any]:
    """What goes to Label Studio for one task. Clips are numbers and links here; no model is named."""
    videos = {f"video_{LETTERS[index]}": url for index, url in enumerate(urls)}
    return {
        "uid": uid,
        "prompt": prompt,
        "order": list(order),
        "fps": fps,
        "guideline": guideline_version,
        **videos,
    }


def read_verdict(annotation: Mapping[str, Any], dimensions: Sequence[str]) -> Verdict:
    """An annotation as a verdict, not yet checked against the rules. Raises Refused if it does not say what it means."""
    said: dict[str, str] = {}
    note = ""
    for item in annotation.get("result") or ():
        name, value = str(item.get("from_name")), item.get("value") or {}
        if name == NOTE:
            note = " ".join(map(str, value.get("text") or ()))
        elif value.get("choices"):
            if len(value["choices"]) != 1 or name in said:
                raise Refused([f"{name} is answered more than once"])
            said[name] = str(value["choices"][0])
    seconds = annotation.get("lead_time")
    choices = tuple(_choice(said, name) for name in dimensions)
    return Verdict(choices, note=note, seconds=None if seconds is None else float(seconds))


def _choice(said: Mapping[str, str], dimension: str) -> Choice:
    best, worst = said.get(BEST + dimension), said.get(WORST + dimension)
    other = said.get(OTHER + dimension)
    if other is not None:
        if best is not None or worst is not None:
            raise Refused([f"{dimension}: {other} and a best or worst clip at once"])
        if other not in OTHER_CHOICES:
            raise Refused([f"{dimension}: {other!r} is not one of {', '.join(OTHER_CHOICES)}"])
        return Choice(dimension, status=other)
    if best is None or worst is None:
        raise Refused([f"{dimension}: best and worst are missing"])
    return Choice(dimension, _index(dimension, best), _index(dimension, worst))


def _index(dimension: str, letter: str) -> int:
    if len(letter) != 1 or letter not in LETTERS:
        raise Refused([f"{dimension}: {letter!r} is no clip"])
    return LETTERS.index(letter)
