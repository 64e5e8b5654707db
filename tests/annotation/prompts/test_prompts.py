"""The prompt pool: what comes in, what is held back and why, how it is balanced."""

from __future__ import annotations

import json
import random
from itertools import combinations

import pytest

from annotation.prompts import curate, near
from annotation.prompts.pool import NEAR_DUPLICATE, curate_pool, import_prompts, list_pool
from annotation.prompts.sources import RawPrompt, read_prompts
from annotation.records import prompt_id
from annotation.store import Store
from reelhf.cli import main
from reelhf.errors import UserError

WORDS = [
    "red",
    "blue",
    "ball",
    "cat",
    "dog",
    "runs",
    "slowly",
    "over",
    "grass",
    "under",
    "sky",
    "near",
    "house",
    "with",
    "long",
    "tail",
    "bright",
]


# --- near-duplicates -----------------------------------------------------------------------------


def test_signatures_agree_as_often_as_the_sets_overlap():
    rng = random.Random(0)
    for share in (0.2, 0.5, 0.9):
        same = {f"s{i}" for i in range(int(400 * share))}
        one = frozenset(same | {f"a{i}" for i in range(400 - len(same))})
        other = frozenset(same | {f"b{i}" for i in range(400 - len(same))})
        agree = (near.minhash(one) == near.minhash(other)).mean()
        assert agree == pytest.approx(near.jaccard(one, other), abs=0.13)
    assert near.minhash(frozenset()).shape == near.minhash(frozenset({str(rng.random())})).shape


def test_the_index_finds_what_comparing_with_every_leader_finds():
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(8, 30))) for _ in range(60)]
    texts += [f"{text} {rng.choice(WORDS)}" for text in texts]
    texts += [
        "一只猫在草地上慢慢地走着镜头跟着它移动",
        "一只猫在草地上慢慢地走着，镜头跟着它移动！",
    ]
    index, leaders = near.ClusterIndex(), []
    for number, text in enumerate(texts):
        slow = next(
            (
                name
                for name, leader in leaders
                if near.jaccard(near.shingles(text), near.shingles(leader))
                >= near.NEAR_DUPLICATE_JACCARD
            ),
            None,
        )
        assert index.nearest(text) == slow
        if slow is None:
            index.add(f"c{number}", text)
            leaders.append((f"c{number}", text))
    assert len(leaders) < len(texts) - 20


# --- what a prompt is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("A red ball rolls over the grass", "en"),
        ("一只猫在草地上走", "zh"),
        ("一只猫 running in Beijing 的街道上", "zh"),
        ("ネコが草の上を歩く", "other"),
        ("고양이가 걷는다", "other"),
        ("Кошка идёт по траве", "other"),
        (
            "Ein roter Ball rollt langsam durch hohes Gras und bleibt dann vor einem Haus liegen",
            "other",
        ),
        ("12345", "other"),
    ],
)
def test_languages_are_told_apart(text, language):
    assert curate.language_of(text) == language


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A red ball rolls over the grass.", None),
        ("一只猫在草地上走", None),
        ("a bicycle", "too short to say what is seen"),
        ("猫", "too short to say what is seen"),
        ("It then jumps over the fence", "refers to something that is not in it"),
        ("再来一个", "refers to something that is not in it"),
        ("same as before but in blue", "refers to something that is not in it"),
        ("Can you make a video of a dog?", "a question, not a description"),
        ("你能画一只狗吗", "a question, not a description"),
        ("either a cat or a dog on a sofa", "leaves a choice open"),
        ("一只猫或者一只狗坐着", "leaves a choice open"),
        ("a portrait of [name] on a horse", "a placeholder was left in"),
        ("mail the clip to jo.doe@example.com please", "personal data"),
        ("call 13912345678 红色的球", "personal data"),
        ("a dog like https://example.com/dog.jpg", "a link"),
        ("!!! 123 ### 456 a b", "hardly any words"),
        ("a bird " * 1000, "longer than 3000 characters"),
    ],
)
def test_a_prompt_that_cannot_be_judged_is_held_back_for_a_reason(text, reason):
    assert curate.unfit(text, curate.language_of(text)) == reason


def test_cleaning_keeps_case_and_punctuation_and_drops_what_nobody_sees():
    assert curate.clean('  "A\u200b Cat,\n\tin  Paris!" ') == "A Cat, in Paris!"
    assert prompt_id(curate.clean("A cat, in Paris!")) == prompt_id("a CAT in paris")


def test_categories_go_by_the_words_that_speak_for_them():
    assert curate.category_of("Two dogs and a cat run on a beach") == "animals"
    assert curate.category_of("一条龙和一个机器人") == "fantasy"
    assert curate.category_of("abstract shapes that pulse") == "other"


# --- balancing -----------------------------------------------------------------------------------


def test_balancing_lowers_what_is_frequent_and_keeps_the_mean():
    counts = {"animals": 400, "people": 100, "food": 25}
    weights = curate.balance(counts, strength=0.5)
    assert weights["animals"] < 1 < weights["food"]
    assert sum(weights[name] * number for name, number in counts.items()) == pytest.approx(525)
    shares = {name: weights[name] * number for name, number in counts.items()}
    assert shares["animals"] / shares["people"] == pytest.approx(2.0)  # the root of 400 / 100
    assert set(curate.balance(counts, strength=0.0).values()) == {1.0}
    even = curate.balance(counts, strength=1.0, most=100.0)
    assert even["animals"] * 400 == pytest.approx(even["food"] * 25)
    assert max(curate.balance({"a": 10_000, "b": 1}, strength=1.0).values()) == 4.0


def test_a_draw_follows_the_weights_is_repeatable_and_without_repeats():
    names = [f"p{i}" for i in range(2000)]
    weights = [3.0 if i < 1000 else 1.0 for i in range(2000)]
    drawn = curate.sample(names, weights, 200)
    assert len(set(drawn)) == 200
    assert drawn == curate.sample(names, weights, 200)
    assert drawn != curate.sample(names, weights, 200, seed=1)
    heavy = sum(int(name[1:]) < 1000 for name in drawn)
    assert 130 < heavy < 170  # three quarters of 200, about
    assert curate.sample(["a", "b"], [0.0, 1.0], 5) == ["b"]


# --- files ---------------------------------------------------------------------------------------


def test_prompts_are_read_from_text_csv_json_lines_and_json(tmp_path):
    (tmp_path / "a.txt").write_text("A red ball\n\nA blue cube\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("caption,category\nA red ball,toys\n", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"prompt_en": "A red ball", "dimension": ["color", "x"]}\n')
    (tmp_path / "d.json").write_text('{"k": {"caption": "A red ball"}}')
    (tmp_path / "e.json").write_text('["A red ball", "A blue cube"]')
    found = {path.name: read_prompts(path) for path in sorted(tmp_path.iterdir())}
    assert [p.text for p in found["a.txt"]] == ["A red ball", "A blue cube"]
    assert found["a.txt"][1].source == "a.txt:3"
    assert (found["b.csv"][0].category, found["b.csv"][0].source) == ("toys", "b.csv:2")
    assert found["c.jsonl"][0].category == "color"
    assert found["d.json"][0].text == "A red ball"
    assert len(found["e.json"]) == 2


def test_a_usage_log_gives_each_prompt_once_with_its_uses_and_nothing_of_the_user(tmp_path):
    log = tmp_path / "usage.log"
    event = {"user": "jo@example.com", "request": {"prompt": "A red ball rolls"}}
    log.write_text(
        "\n".join(
            [
                "2026-11-01 INFO " + json.dumps(event),
                json.dumps({"prompt": "A red ball rolls", "ip": "192.0.2.1"}),
                '192.0.2.7 - - "GET /generate?prompt=A+blue+cube%2C+spinning&u=7 HTTP/1.1" 200',
                "nothing to see here",
            ]
        )
    )
    found = read_prompts(log)
    assert {p.text: p.uses for p in found} == {"A red ball rolls": 2, "A blue cube, spinning": 1}
    assert "example" not in repr(found)
    only = read_prompts(log, field="request.prompt")
    assert [p.uses for p in only] == [1]


def test_unreadable_sources_are_named(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / "b.csv").write_text("promt\nA ball\n")
    (tmp_path / "c.jsonl").write_text("{not json\n")
    (tmp_path / "d.txt").write_text("\n")
    for name, field, words in (
        ("a.bin", None, "say what it is with --format"),
        ("b.csv", "prompt", r"b.csv:2 has no text under prompt.*promt"),
        ("c.jsonl", None, "c.jsonl line 1 is not JSON"),
        ("d.txt", None, "holds no prompt"),
        ("none.txt", None, "cannot read"),
    ):
        with pytest.raises(UserError, match=words):
            read_prompts(tmp_path / name, field=field)


# --- the pool ------------------------------------------------------------------------------------


def raw(*texts):
    return [RawPrompt(text, f"test:{number}") for number, text in enumerate(texts)]


LONG = (
    "A small red ball with a matte surface rolls slowly from left to right over a pale blue floor"
)


def test_an_import_takes_drops_and_holds_back_and_a_dry_run_writes_nothing(new_project):
    store = new_project(tasks=1)
    prompts = raw(LONG, LONG.upper() + "!", LONG + " today", "a bicycle", "一只猫在草地上慢慢地走")
    before = store.counts()["prompts"]
    report = import_prompts(store, prompts, dry_run=True)
    assert store.counts()["prompts"] == before
    assert (report.read, report.duplicates, len(report.candidates)) == (5, 1, 4)
    assert report.held == {NEAR_DUPLICATE: 1, "too short to say what is seen": 1}
    assert report.languages == {"en": 3, "zh": 1}
    assert import_prompts(store, prompts).held == report.held
    again = import_prompts(store, prompts)
    assert (again.duplicates, again.candidates) == (5, [])
    rows = {row.text: row for row in list_pool(store, status=None)}
    assert rows[LONG].uses == 1 + 1 + 2, "a copy in the file, then the second import's two"
    assert rows[LONG + " today"].reason == NEAR_DUPLICATE
    assert rows[LONG + " today"].cluster == rows[LONG].cluster, "they lie in one split"
    assert rows[LONG].source == "test:0"
    active = [row.text for row in list_pool(store)]
    assert "a bicycle" not in active
    assert LONG in active


def test_pools_are_a_projects_own_and_their_texts_are_shared(new_project):
    store = new_project(tasks=1)
    import_prompts(store, raw(LONG), project="one")
    number = store.counts()["prompts"]
    import_prompts(store, raw(LONG, "Two dogs run over a beach"), project="two")
    assert store.counts()["prompts"] == number + 1
    assert [len(list_pool(store, project=name)) for name in ("one", "two")] == [1, 2]
    with pytest.raises(UserError, match="no project 'three'"):
        list_pool(store, project="three")


def test_curation_weighs_categories_and_changes_its_mind_only_for_a_reason(new_project):
    store = new_project(tasks=1)
    animals = [f"{n} dogs and a cat in scene number {n}" for n in range(9)]
    import_prompts(
        store, raw(*animals, "A robot made of steel dances", LONG, LONG + " today"), project="pool"
    )
    report = curate_pool(store, project="pool", dry_run=True)
    assert {row.weight for row in list_pool(store, project="pool")} == {1.0}
    assert curate_pool(store, project="pool") == report
    assert (sum(report.held.values()), report.released) == (0, 0)
    weight = {row.category: row.weight for row in list_pool(store, project="pool")}
    assert weight["animals"] < 1 < weight["fantasy"]
    assert len(list_pool(store, project="pool", number=3)) == 3


def test_the_verbs_import_curate_and_list(tmp_path, capsys):
    source, project, out = tmp_path / "p.txt", str(tmp_path / "pool"), tmp_path / "out.txt"
    source.write_text(f"{LONG}\na bicycle\n两只狗在沙滩上奔跑\n", encoding="utf-8")
    words = ["annotate", "prompts", "import", str(source), "--project", project]
    main(words)
    assert "3 prompts read: 0 duplicates, 2 taken, 1 held back" in capsys.readouterr().out
    main([*words, "--dry-run"])
    assert "3 duplicates" in capsys.readouterr().out
    main(["annotate", "prompts", "curate", "--project", project])
    main(["annotate", "prompts", "list", "--project", project, "--status", "held"])
    assert "a bicycle  [held: too short to say what is seen]" in capsys.readouterr().out
    main(
        ["annotate", "prompts", "list", "--project", project, "--language", "zh", "--out", str(out)]
    )
    assert out.read_text(encoding="utf-8") == "两只狗在沙滩上奔跑\n"
    with pytest.raises(SystemExit):
        main(["annotate", "prompts", "curate", "--project", project, "--balance", "2"])
    assert "--balance is 2.0; expected 0 to 1" in capsys.readouterr().err


@pytest.mark.realdata
def test_the_real_prompt_lists_come_in_in_both_languages(tmp_path, real_data):
    """VBench: most are taken; one-word prompts and near-copies are held back; clusters are those of exhaustive comparison."""
    folder = real_data / "prompts"
    reports = {}
    with Store.open(tmp_path / "pool") as store:
        for name in ("vbench_all_dimension.txt", "vbench_all_dimension_cn.txt"):
            reports[name] = import_prompts(store, read_prompts(folder / name))
        rows = list_pool(store, status=None)
        report = curate_pool(store)
    english, chinese = reports.values()
    assert english.read == chinese.read == 946
    assert english.languages["en"] == len(english.candidates)
    assert chinese.languages["zh"] == len(chinese.candidates)
    assert 0.8 < 1 - sum(english.held.values()) / english.read < 0.95
    assert 0.9 < 1 - sum(chinese.held.values()) / chinese.read < 0.99
    assert len(report.weights) >= 8
    leaders = [row for row in rows if row.cluster == row.prompt_id][:500]
    for one, other in combinations(leaders, 2):
        similar = near.jaccard(near.shingles(one.text), near.shingles(other.text))
        assert similar < near.NEAR_DUPLICATE_JACCARD
