"""The page of a run, in a browser where there is one, and the numbers on it worked by hand."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from experiments import evidence, metrics
from experiments import page as pages_of
from experiments.cli import main

pytestmark = pytest.mark.usefixtures("pages_drawn")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def rows(
    risk: list[float], event: list[int], minute: list[int] | None = None, stay: list[int] | None = None
) -> pl.DataFrame:
    n = len(risk)
    stays = list(range(n)) if stay is None else stay
    return pl.DataFrame({
        "stay_id": stays, "patient_id": [str(s) for s in stays], "minute": minute or [1440] * n,
        "target": [float(e) for e in event], "probability": risk,
    })  # fmt: skip


# ---- numbers ------------------------------------------------------------------------------------------------------------------


def test_net_benefit_of_ten_patients_by_hand() -> None:
    """Of those at 0.2 or above 4 of 6 have the event: 4/10 - 2/10 * 0.25 = 0.35; at 0.5 or above 3 of 4: 3/10 - 1/10 = 0.2."""
    ten = rows([0.9, 0.8, 0.7, 0.5, 0.3, 0.2, 0.1, 0.1, 0.05, 0.0], [1, 1, 0, 1, 1, 0, 0, 1, 0, 0])
    curve = evidence.net_benefit(ten, [0.2, 0.5])
    assert curve["model"].to_list() == pytest.approx([0.35, 0.2])
    assert curve["everybody"].to_list() == pytest.approx([0.5 - 0.25 * 0.5, 0.5 - 0.5])


def test_lead_times_of_hand_made_stays() -> None:
    """Stay 1 alerts 3 hours before its event and again 1 hour before, stay 2 only 60 hours before, stay 3 after; 4 has no event."""
    table = rows(
        [0.1, 0.9, 0.2, 0.9, 0.9, 0.1, 0.1, 0.9, 0.9, 0.1], [0, 1, 1, 1, 0, 1, 1, 1, 0, 0],
        [60, 120, 180, 240, 60, 3600, 120, 360, 60, 120], [1, 1, 1, 1, 2, 2, 3, 3, 4, 4],
    )  # fmt: skip
    event = pl.DataFrame({"stay_id": [1, 2, 3, 4], "event_minute": [300, 3660, 300, None]})
    lead = evidence.lead_times(table, event, 0.5)
    assert lead.select("stay_id", "lead").rows() == [(1, 3.0), (2, None), (3, None)]
    burden = evidence.alarm_burden(table, 0.5)
    assert burden["alerts_per_day"] == pytest.approx(24 * 5 / 10)
    assert burden["alerts_per_day_without_event"] == pytest.approx(24 / 2)
    assert burden["alarmed"] == 1


def cohort(n: int = 600) -> tuple[pl.DataFrame, pl.DataFrame]:
    rng = np.random.default_rng(0)
    z = rng.normal(-1, 1.5, n)
    table = rows((1 / (1 + np.exp(-z))).tolist(), (rng.random(n) < 1 / (1 + np.exp(-z))).astype(int).tolist())
    stays = pl.DataFrame({
        "stay_id": range(n), "age": rng.uniform(20, 95, n), "sex": [None, *(rng.random(n - 1) < 0.5).astype(float)],
        "unit": rng.choice(["medical", "neuro"], n, p=[0.985, 0.015]), "hospital_id": rng.choice(["a", "b"], n),
        "icu_minutes": rng.integers(1000, 9000, n), "hospital_death": table["target"].to_numpy() == 1,
    })  # fmt: skip
    return table, stays


def test_the_table_of_patients_is_that_of_polars_by_hand() -> None:
    table, stays = cohort()
    event = table["target"].to_numpy() == 1
    lactate = np.where(np.arange(len(event)) % 4 == 0, np.nan, np.linspace(1, 9, len(event)))
    who = evidence.patients(stays, event, {"lactate": lactate})
    row = {record["what"]: record for record in who.to_dicts()}
    ill = stays.filter(pl.Series(event))
    quartiles = [ill["age"].quantile(q, "linear") for q in (0.5, 0.25, 0.75)]
    assert row["age, years"]["with"] == "{:.3g} ({:.3g} to {:.3g})".format(*quartiles)
    men = ill.filter(sex=1.0)
    assert row["men"]["with"] == f"{len(men)} ({100 * len(men) / ill['sex'].count():.1f} %)"
    assert row["lactate"]["missing"] == "25 %"
    assert row["unit: neuro"]["with"] == "< 10"
    assert row["stays"]["without"] == str(len(stays) - len(ill))


def test_small_groups_are_not_told() -> None:
    table, stays = cohort()
    groups = evidence.subgroups(table, stays, 0.5)
    neuro = groups.row(by_predicate=pl.col("group") == "unit: neuro", named=True)
    assert neuro["events"] is None and neuro["auroc"] is None
    women = groups.row(by_predicate=pl.col("group") == "women", named=True)
    part = table.filter(pl.col("stay_id").is_in(stays.filter(sex=0.0)["stay_id"].implode()))
    assert women["auroc"] == pytest.approx(metrics.score(part, 0.5, 0)["auroc"]["value"])
    assert women["stays"] == len(part)
    everybody = groups.row(0, named=True)
    assert (everybody["group"], everybody["stays"]) == ("everybody", len(table))


def test_operating_points_are_chosen_on_one_table_and_measured_on_another() -> None:
    table, _ = cohort()
    half = len(table) // 2
    chosen, measured = table.head(half), table.tail(half)
    task = {"name": "mortality_hospital"}
    points = evidence.operating_points(chosen, measured, ("youden", 0.4), task)
    row = points.row(by_predicate=pl.col("operating point") == "sensitivity=0.9", named=True)
    threshold = metrics.choose_threshold(chosen, "sensitivity=0.9", task)
    assert row["threshold"] == f"{threshold:.3g}"
    assert row["sensitivity"].startswith(f"{metrics.score(measured, threshold, 0)['sensitivity']['value']:.3f}")
    assert points["operating point"][0] == "youden (the model's)"


# ---- the page -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(mimic: Path, eicu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of trees, scored on a second system, and hourly."""
    runs = tmp_path_factory.mktemp("pages")
    line = f"train --model LightGBM --model.rounds 20 --data SyntheticMIMICIV --data.root {mimic} --runs {runs}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages_of, "EXPLAINED", 30)
        _make(line, eicu, runs)
    return runs


def _make(line: str, eicu: Path, runs: Path) -> None:
    main(f"{line} --name icu --finetune SyntheticEICU --finetune.root {eicu} --transfer.recalibrate prevalence".split())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages_of, "write", lambda *_, **__: None)  # of the hourly run, whose evaluation has one
        main(f"{line} --name hourly --data.task mortality_24h --data.rolling true --data.hours 24".split())
    main(f"evaluate --ckpt {runs / 'hourly' / 'best.ckpt'} --data.split all --out {runs / 'all'}".split())
    main(
        f"evaluate --ckpt {runs / 'icu' / 'best.ckpt'} --data.split val --beside {runs / 'icu'} --out {runs / 'val'}".split()
    )


def test_a_page_holds_every_score_and_asks_nothing_of_the_network(pages: Path) -> None:
    for folder in ("icu", "icu/finetune-prevalence-SyntheticEICU", "all", "val"):
        page = (pages / folder / "report.html").read_text()
        assert len(page) < 3_000_000
        markup = re.sub("<pre>.*?</pre>", "", page, flags=re.DOTALL)
        outside = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#)([^"')>\s]+)""", markup)
        assert not [place for place in outside if not place.startswith(("#", "data:"))]
        assert "<script" not in page and "@import" not in page
        written = json.loads((pages / folder / "metrics.json").read_text())
        result = written if "auroc" in written else list(written.values())[-1]
        for name, metric in metrics.METRICS.items():
            if metric.label and result[name]["value"] is not None:
                assert metrics.text(name, result) in page
        model_card = (pages / folder / "card.md").read_text()
        assert all(
            metrics.text(name, result) in model_card for name in ("auroc", "slope") if result[name]["value"] is not None
        )
        assert "none, simulated" in model_card and "nan" not in model_card and "None" not in model_card
        for head in (
            "Operating points",
            "Decision curve",
            "Subgroups",
            "Patients",
            "Configuration",
            "Cards of model and data",
        ):
            assert head in page
        assert ("Lead time and alarms" in page) == (folder == "all")
        assert ("class_path" in page) == (folder not in ("all", "val"))
        assert ("Beside other runs" in page) == (folder == "val")
        assert "What predictions rest on" in page and "Data card" in (pages / folder / "data_card.md").read_text()
    transferred = (pages / "icu/finetune-prevalence-SyntheticEICU" / "report.html").read_text()
    assert "SyntheticMIMICIV (source)" in transferred and "source&#x27;s threshold" in transferred


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_a_word_and_without_scrolling_sideways(
    pages: Path, tmp_path: Path, width: int
) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=True)

    page = (pages / "icu" / "report.html").read_text()
    probe = tmp_path / "probe.html"  # says how wide the content is
    script = "<script>onload=()=>document.title=document.documentElement.scrollWidth+' '+document.querySelectorAll('figure svg').length</script>"
    probe.write_text(page.replace("</body>", f"{script}</body>"))
    dom = run("--dump-dom", f"--window-size={width},1000", probe.as_uri()).stdout
    wide, pictures = map(int, re.search(r"<title>(\d+) (\d+)</title>", dom).groups())  # type: ignore[union-attr]
    assert wide <= max(width, 500)  # what a headless window is narrowed to at most
    assert pictures >= 2
    picture = tmp_path / "page.png"
    run(f"--screenshot={picture}", f"--window-size={width},2000", (pages / "icu" / "report.html").as_uri())
    assert picture.stat().st_size > 30_000
    pdf = tmp_path / "page.pdf"
    run(f"--print-to-pdf={pdf}", (pages / "icu" / "report.html").as_uri())
    assert pdf.read_bytes().startswith(b"%PDF") and pdf.stat().st_size > 20_000
