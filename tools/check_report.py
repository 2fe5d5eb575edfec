"""The report in a real browser: read, searched, filtered, driven by keys, attacked, and timed.

    apt-get install -y chromium chromium-driver && pip install -e ".[browser]"
    python -m tools.check_report [--records=20000] [--screenshots=DIR] [--result=FILE.json]

Two sites are written into a temporary folder and opened by file:// in headless Chromium: a made-up
run of --records records, and one whose every text, id and name is hostile (tools/report_runs.py).
What the page shows is compared with the records; a console error, a dialog or a request that leaves
the site fails the check. Exit code 1 says what was wrong.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from etils import epath
from selenium.common import exceptions
from selenium.webdriver.common.keys import Keys

from mathv2_jax.data import lineage
from mathv2_jax.report import cases, site
from tools import report_runs
from tools.report_page import Page, WrongError, browsing, require

WIDE, PHONE = (1200, 820), (390, 844)
TIMES = 9
# Runs before the page's own scripts: when the first row was painted.
WATCH = """
window.rowsAt = null;
new MutationObserver((_, observer) => {
  if (!document.querySelector(".row")) return;
  observer.disconnect();
  requestAnimationFrame(() => setTimeout(() => { window.rowsAt = performance.now(); }));
}).observe(document, { childList: true, subtree: true });
"""
# Presses a button of a list's tools: milliseconds until its rows were painted.
PRESS = """
const [kind, done] = arguments;
const before = document.querySelector(".list");
const began = performance.now();
document.querySelector(`[data-kind="${kind}"]`).click();
(function wait() {
  const list = document.querySelector(".list");
  if (list === before || !list.isConnected) return setTimeout(wait);
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));
})();
"""
TEXTS = pathlib.Path(__file__).with_name("check_texts.js")
# Milliseconds to read the text of every proof for a word, in a page that has loaded none.
SEARCH = """
const [done] = arguments;
const began = performance.now();
report.filters.texts("cauchy", () => false, () => {}).then(() => done(performance.now() - began));
"""
# Elements and attributes that the page never makes, whatever a text says.
FOREIGN = """
const made = [...document.querySelectorAll("*")];
const kinds = "img iframe object embed style base audio video marquee foreignObject animate";
return made.filter((each) =>
  kinds.split(" ").includes(each.localName) ||
  each.getAttributeNames().some((name) => name.startsWith("on")) ||
  (each.localName === "link" && !each.getAttribute("href").startsWith("assets/")) ||
  (each.localName === "a" && !each.getAttribute("href").startsWith("#")) ||
  (each.localName === "script" && !/^(assets|data)\\//.test(each.getAttribute("src") ?? ""))
).map((each) => each.outerHTML.slice(0, 120));
"""


def check_texts(page: Page) -> None:
    """What reads texts, on texts that nobody would write."""
    page.open()
    found = page.run(TEXTS.read_text(encoding="utf-8"))
    require(not isinstance(found, str), f"wrong: {found}")
    require(found < 3_000, f"a text took {found:.0f} ms")
    page.require_quiet()


def check_reading(page: Page, chapters: list[cases.Chapter]) -> None:
    """From a problem to a refined proof, an analysis, what changed, and back."""
    page.open("#/problems")
    place = next(n for n, c in enumerate(chapters) if any(case.parents for case in c.cases))
    page.run(f"window.scrollTo(0, {64 * place})")
    page.until(f"return document.getElementById('row-{place}')", "the problem's row is not drawn")
    page.click(f"#row-{place}")
    chapter = chapters[place]
    page.until("return location.hash.startsWith('#/problem/')", "the problem did not open")
    page.until("return document.querySelector('.statement .katex')", "no formula is drawn")
    number = next(n for n, case in enumerate(chapter.cases) if case.parents and case.remarks)
    page.run(f"window.scrollTo(0, {64 * number})")
    page.until(f"return document.getElementById('row-{number}')", "the proof's row is not drawn")
    page.click(f"#row-{number}")
    page.until("return document.querySelector('.body .katex')", "the proof shows no formula")
    case = chapter.cases[number]
    require(page.text(".origin code") == case.id, f"another proof than {case.id} opened")
    page.click(".remark summary", 1)
    page.until("return document.querySelector('.remark[open] .prose')", "no analysis opened")
    page.click(".modes button", 1)
    page.until("return document.querySelector('.changes ins')", "no changed words are shown")
    page.click(".modes button", 2)
    page.until("return document.querySelector('.lines ins')", "no changed lines are shown")
    shown = page.run("return document.querySelectorAll('.lines del').length")
    old = next(c for c in chapter.cases if c.id == case.parents[0]).text.split("\n")
    gone = [line for line in old if line not in case.text.split("\n")]
    require(shown >= len(gone), f"{shown} lines are struck out, at least {len(gone)} are gone")
    page.run("history.back()")
    page.until("return document.querySelector('.row[aria-selected=true]')", "no way back")
    page.require_quiet()


def check_reward(page: Page, chapters: list[cases.Chapter]) -> None:
    """The components of a trained proof's reward, and its meta-verdict."""
    everyone = [case for chapter in chapters for case in chapter.cases]
    case = next(c for c in everyone if c.sample and len(c.sample.rewards) > 2 and c.metas)
    assert case.sample is not None
    page.open(f"#/proof/{case.id.replace('/', '%2F')}")
    shown = page.run(
        "return [...document.querySelectorAll('aside .rewards tr')].map((row) =>"
        " [row.querySelector('th').textContent, row.querySelector('.amount').textContent])"
    )
    for name, value in case.sample.rewards.items():
        want = f"{round(value, 3):g}"
        require([name, want] in shown, f"reward {name} = {want} is not shown: {shown}")
    page.click(".remark summary")
    page.until("return document.querySelector('.remark .remark')", "no meta-verdict is shown")
    page.require_quiet()


def count_of(page: Page) -> int:
    return int(page.text(".status").split()[0].replace(",", ""))


def check_filters(page: Page, chapters: list[cases.Chapter]) -> None:
    """Every filter shows as many proofs as the records have."""
    everyone = [case for chapter in chapters for case in chapter.cases]
    for kind, holds in EXPECTED.items():
        page.open(f"#/proofs?kinds={kind}")
        want = sum(map(holds, everyone))
        require(count_of(page) == want, f"{kind} shows {count_of(page)}, the records have {want}")
    page.require_quiet()


def _above(case: cases.Case) -> bool:
    votes = case.votes
    return case.self_score is not None and bool(votes) and case.self_score > sum(votes) / len(votes)


def _labels_differ(case: cases.Case) -> bool:
    auto, person = case.label_by(people=False), case.label_by(people=True)
    return None not in (auto, person) and auto != person


EXPECTED: dict[str, Callable[[cases.Case], bool]] = {
    "above": _above,
    "split": lambda case: len(set(case.votes)) > 1,
    "labels": _labels_differ,
    "refined": lambda case: bool(case.parents),
    "unread": lambda case: case.sample is not None and case.sample.outcome != "parsed",
}


def check_search(page: Page, chapters: list[cases.Chapter]) -> None:
    """Words of statements at once, words of proofs when their texts were read."""
    page.open("#/problems")
    page.press("/", "triangle")
    want = sum("triangle" in c.problem.statement for c in chapters)
    page.until(
        f"return parseInt(document.querySelector('.status').textContent) === {want}",
        f"{page.text('.status')} about triangles, the records have {want}",
    )
    page.open("#/proofs?q=Cauchy")
    texts = [f"{c.text}\n{c.self_analysis}" for chapter in chapters for c in chapter.cases]
    want = sum("cauchy" in text.lower() for text in texts)
    page.until(
        "return !/texts/.test(document.querySelector('.status').textContent)", "no end of search"
    )
    require(count_of(page) == want, f"{count_of(page)} proofs of Cauchy, the records have {want}")
    page.require_quiet()


def check_keys(page: Page) -> None:
    """Everything by the keyboard alone: search, list, proof, changes, analysis, and back."""
    page.open()
    page.press("?")
    require(page.run("return document.getElementById('keys').open"), "? shows no keys")
    page.press(Keys.ESCAPE)
    page.press("/", "search/")
    page.until("return location.hash.includes('q=')", "typing does not search")
    page.press(Keys.ENTER)
    page.until("return document.activeElement.matches('.list')", "Enter leaves the search's focus")
    page.press("j", "j", Keys.ARROW_DOWN, "k")
    place = page.run("return document.querySelector('[aria-selected=true]').ariaPosInSet")
    require(place == "3", f"j j down k selects {place}, not 3")
    page.press(Keys.ENTER)
    page.until("return document.querySelector('.body')", "Enter opens no proof")
    first = page.text(".origin code")
    page.press("n")
    page.until(f"return document.querySelector('.origin code')?.textContent !== {first!r}", "no n")
    page.press("p")
    page.until(f"return document.querySelector('.origin code')?.textContent === {first!r}", "no p")
    page.press("j", "j", Keys.ENTER)
    page.until("return document.querySelector('details[open] .prose')", "Enter opens no analysis")
    page.press(Keys.ESCAPE)
    page.until("return location.hash.startsWith('#/proofs')", "Escape does not go back")
    place = page.run("return document.querySelector('[aria-selected=true]').ariaPosInSet")
    require(place == "3", f"after the way back {place} is selected, not 3")
    page.press("t")
    require(page.run("return document.documentElement.dataset.theme === 'dark'"), "t is not dark")
    page.press("t")
    page.require_quiet()


def check_hostile(page: Page, ids: list[str]) -> None:
    """Every view of the hostile run, everything opened: it is text, and nothing happens."""
    views = ["#/", "#/problems", "#/proofs", "#/proofs?q=%3Cscript%3E&stage=%3Cb%3E&order=x"]
    stages = page_names(page, "#/curves")
    views += [f"#/curves?stage={stage}" for stage in stages]
    page.open()
    addresses = page.run(
        "return report.store.index.cases.id.map((id) => report.dom.address('proof', id)).concat("
        "report.store.index.problems.id.map((id) => report.dom.address('problem', id)))"
    )
    require(len(addresses) == 2 * len(ids), f"{len(addresses)} addresses of {len(ids)} problems")
    for address in [*views, *addresses]:
        page.open(address)
        # Asked there: a text that is no Unicode cannot come here.
        missing = page.run("return document.querySelector('h1').textContent === 'Not found'")
        require(not missing, f"{address} shows nothing")
        for _ in range(3):  # details inside of details
            page.run(
                "document.querySelectorAll('details').forEach((each) => { each.open = true; })"
            )
            time.sleep(0.05)
        for button in range(page.run("return document.querySelectorAll('.modes button').length")):
            page.click(".modes button", button)
            require_inert(page)
        require_inert(page)
    page.require_quiet()


def page_names(page: Page, address: str) -> list[str]:
    """The stages whose curves there are, as addresses hold them."""
    page.open(address)
    links = "return [...document.querySelectorAll('.stages a')].map((link) => link.hash)"
    return [link.split("stage=")[1] for link in page.run(links)]


def require_inert(page: Page) -> None:
    require(
        page.run("return window.pwned === undefined && Object.prototype.pwned === undefined"),
        "pwned",
    )
    foreign = page.run(FOREIGN)
    require(not foreign, f"a text made elements: {foreign[:3]}")
    covers = page.run(
        "const box = document.querySelector('.top').getBoundingClientRect();"
        "return !document.elementFromPoint(box.left + 20, box.top + 20).closest('.top')"
    )
    require(not covers, "a text covers the head of the page")


def measure(page: Page) -> dict[str, Any]:
    """Milliseconds, TIMES each: from navigation to a painted list, filters, a search of texts."""
    watch = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})[
        "identifier"
    ]
    found: dict[str, list[float]] = {}
    for _ in range(TIMES):
        for name, address in (("problems", "#/problems"), ("proofs", "#/proofs")):
            page.driver.get("about:blank")
            page.driver.get(f"{(page.at / 'index.html').as_uri()}{address}")
            page.until("return window.rowsAt !== null", "no list was painted")
            took = page.run("return window.rowsAt")
            found.setdefault(f"open {name}", []).append(took)
        for kind in EXPECTED:
            page.open("#/proofs")
            took = page.driver.execute_async_script(PRESS, kind)
            found.setdefault(f"filter {kind}", []).append(took)
        page.open("#/proofs")
        took = page.driver.execute_async_script(SEARCH)
        found.setdefault("search all texts", []).append(took)
    page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": watch})
    return {
        name: {
            "n": len(all_),
            "median_ms": round(statistics.median(all_)),
            "max_ms": round(max(all_)),
        }
        for name, all_ in found.items()
    }


def take_screenshots(page: Page, chapters: list[cases.Chapter], to: pathlib.Path) -> None:
    """What a reader sees: light, dark, and as wide as a phone."""
    to.mkdir(parents=True, exist_ok=True)
    everyone = [case for chapter in chapters for case in chapter.cases]
    refined = next(c for c in everyone if len(c.parents) > 1 and c.remarks)
    labelled = next(c for c in everyone if len(c.labels) > 1 and c.metas)
    proof, other = (f"#/proof/{c.id.replace('/', '%2F')}" for c in (refined, labelled))
    changes = "document.querySelectorAll('.modes button')[1].click()"
    for name, address, size, dark, prepare in (
        ("proofs", "#/proofs?kinds=above", WIDE, False, ""),
        ("changes", proof, WIDE, False, changes),
        ("proof-dark", other, WIDE, True, "document.querySelector('.remark').open = true"),
        ("curves-dark", "#/curves?stage=generator-1", WIDE, True, ""),
        ("proofs-phone", "#/proofs?kinds=above", PHONE, False, ""),
        ("changes-phone", proof, PHONE, True, changes),
    ):
        page.resize(size, dark)
        page.open(address)
        if prepare:
            page.run(prepare)
        page.until("return document.fonts.status === 'loaded'", "fonts do not load")
        time.sleep(0.3)
        wide = page.run("return document.documentElement.scrollWidth")
        require(wide <= size[0], f"{name} is {wide} pixels wide, the window has {size[0]}")
        page.driver.save_screenshot(str(to / f"{name}.png"))
    page.resize(WIDE)


def check(records: int, screenshots: pathlib.Path | None, folder: pathlib.Path) -> dict[str, Any]:
    """Every check; what was measured."""
    run, hostile = folder / "run", folder / "hostile"
    number = report_runs.make(run, records)
    ids = report_runs.make_hostile(hostile)
    began = time.monotonic()
    made = site.write(epath.Path(run), epath.Path(run / "report"))
    seconds = time.monotonic() - began
    site.write(epath.Path(hostile), epath.Path(hostile / "report"))
    chapters = cases.gather(lineage.read(epath.Path(run / "records")), ["sft", "generator-1"])
    with browsing() as driver:
        page = Page(driver, run / "report")
        page.resize(WIDE)
        steps: dict[str, Callable[[], None]] = {
            "texts": lambda: check_texts(page),
            "reading": lambda: check_reading(page, chapters),
            "rewards": lambda: check_reward(page, chapters),
            "filters": lambda: check_filters(page, chapters),
            "search": lambda: check_search(page, chapters),
            "keys": lambda: check_keys(page),
            "hostile texts": lambda: check_hostile(Page(driver, hostile / "report"), ids),
        }
        for name, step in steps.items():
            step()
            print(f"{name}: as it must be", flush=True)
        times = measure(page)
        if screenshots is not None:
            take_screenshots(page, chapters, screenshots)
        page.require_quiet()
        version = driver.capabilities["browserVersion"]
    return {
        "records": number,
        "proofs": made.proofs,
        "chromium": version,
        "write_seconds": round(seconds, 2),
        "times": times,
    }


def main() -> int:
    asked = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked.add_argument("--records", type=int, default=20_000)
    asked.add_argument("--screenshots", type=pathlib.Path)
    asked.add_argument("--result", type=pathlib.Path)
    given = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = check(given.records, given.screenshots, pathlib.Path(folder))
        except (WrongError, exceptions.WebDriverException) as error:
            print(f"check_report: {str(error).partition('Stacktrace')[0]}", file=sys.stderr)
            return 1
    text = json.dumps(found, indent=1)
    print(text)
    if given.result is not None:
        given.result.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
