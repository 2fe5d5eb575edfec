"use strict";
// What was said about a proof: its self-analysis, analyses, meta-verdicts, and their rewards.

report.remarks = (() => {
  const { store, mathematics } = report;
  const { make, number } = report.dom;
  const { badge, outcome, fact } = report.scores;
  const AT_ONCE = 40; // analyses that are listed before one asks for more

  // What a total is made of, by the components that it has (arXiv 2511.22570, section 2).
  const RULES = [
    {
      parts: ["honesty", "proof"],
      text: "total = format · (α proof + β honesty), honesty = self · meta",
    },
    { parts: ["score", "meta"], text: "total = format · score · meta, score = 1 − |said − label|" },
    { parts: ["score"], text: "total = format · score, score = 1 − |said − label|" },
  ];

  const cases = () => store.index.cases;

  // A <details> whose content is made when it is first opened.
  function folded(summary, content, attributes = {}) {
    const node = make("details", attributes, make("summary", {}, ...[summary].flat()));
    node.addEventListener("toggle", () => {
      if (node.open && node.childElementCount === 1)
        node.append(make("div", { class: "inside" }, content()));
    });
    return node;
  }

  // The self-analysis, then all analyses, the lowest scores first.
  function list(at, entry) {
    const node = make("section", { "aria-label": "Analyses" });
    if (entry.self) {
      const own = {
        text: entry.self,
        score: store.half(cases().self[at]),
        source: "the generator's own",
        metas: entry.metas,
      };
      node.append(make("h2", {}, "Self-analysis"), remark(own));
    }
    const ranked = entry.remarks.map((each, place) => ({ each, place }));
    ranked.sort(
      (one, other) => (one.each.score ?? 2) - (other.each.score ?? 2) || one.place - other.place,
    );
    if (ranked.length) {
      node.append(
        make("h2", {}, "Analyses ", make("span", { class: "quiet" }, number(ranked.length))),
      );
    } else if (!entry.self) {
      node.append(make("p", { class: "quiet" }, "Nobody has analysed it."));
    }
    const more = make("button", { type: "button", class: "more" });
    let next = 0;
    const extend = () => {
      more.before(...ranked.slice(next, next + AT_ONCE).map(({ each }) => remark(each)));
      next += AT_ONCE;
      more.hidden = next >= ranked.length;
      more.textContent = `Show more of ${ranked.length}`;
    };
    node.append(more);
    more.addEventListener("click", extend);
    extend();
    const same = cases().same[at];
    if (same !== null && !entry.remarks.length) {
      more.before(
        make(
          "p",
          { class: "note" },
          "The same proof was written and verified before: ",
          report.proof.linkTo(same, report.scores.where(same)),
          ".",
        ),
      );
    }
    return { node, move: (by) => moveFocus(node, by) };
  }

  function moveFocus(node, by) {
    const all = [...node.querySelectorAll("summary")];
    const at = all.indexOf(document.activeElement);
    const target = all[Math.max(0, Math.min(all.length - 1, at < 0 ? 0 : at + by))];
    target?.focus();
    target?.scrollIntoView({ block: "nearest" });
  }

  function remark(each) {
    const votes = each.metas.map((meta) => meta.score);
    const step =
      each.step === undefined
        ? ""
        : `, ${each.source === "search" ? "round" : "step"} ${each.step}`;
    const summary = [
      badge(each.score),
      make("span", { class: "source" }, `${each.source || "given"}${step}`),
      each.outcome && each.outcome !== "parsed" ? outcome(each.outcome) : null,
      votes.length
        ? fact(
            votes.length > 1 ? "meta-verdicts" : "meta-verdict",
            ...votes.slice(0, 8).map((vote) => badge(vote)),
          )
        : null,
      each.label ? fact(`label by ${each.label.source}`, badge(each.label.score)) : null,
      make("span", { class: "begins" }, ...mathematics.line(beginning(each.text), 160).childNodes),
    ];
    return folded(summary.filter(Boolean), () => inside(each), {
      class: "remark",
      "data-score": each.score ?? "none",
    });
  }

  // Where an analysis begins to say something of its own.
  function beginning(text) {
    const own = text.replace(/^\s*Here is my [^\n]{0,60}:\s*/, "");
    return own.trim() || text;
  }

  function inside(each) {
    return make(
      "div",
      {},
      mathematics.prose(each.text || "(nothing was written)"),
      each.thinking ? folded("Thinking before it", () => mathematics.prose(each.thinking)) : null,
      each.rewards?.length ? rewards(each.rewards, each.advantage, each.target) : null,
      each.id
        ? make(
            "p",
            { class: "quiet" },
            make("code", {}, each.id),
            each.checkpoint ? ` by ${each.checkpoint}` : "",
          )
        : null,
      each.metas.length ? make("h3", {}, "Meta-verdicts: is this analysis right?") : null,
      ...each.metas.map((meta) => remark(meta)),
    );
  }

  // Every component of a reward as a bar from 0 to 1, the total last.
  function rewards(all, advantage, target = null) {
    const parts = [
      ...all.filter(([name]) => name !== "total"),
      ...all.filter(([name]) => name === "total"),
    ];
    const rows = parts.map(([name, value]) => {
      const filled = make("span", { class: "fill" });
      filled.style.width = `${100 * Math.max(0, Math.min(1, value))}%`;
      return make(
        "tr",
        { class: name === "total" ? "total" : null },
        make("th", { scope: "row" }, name),
        make("td", { class: "meter" }, filled),
        make("td", { class: "amount" }, number(value, 3)),
      );
    });
    const extra = [
      ["advantage", advantage],
      ["compared with", target],
    ].filter(([, value]) => value !== null && value !== undefined);
    rows.push(
      ...extra.map(([name, value]) =>
        make(
          "tr",
          {},
          make("th", { scope: "row" }, name),
          make("td"),
          make(
            "td",
            { class: "amount" },
            `${name === "advantage" && value > 0 ? "+" : ""}${number(value, 3)}`,
          ),
        ),
      ),
    );
    const table = make(
      "table",
      { class: "rewards" },
      make("caption", {}, "Reward"),
      make("tbody", {}, ...rows),
    );
    const rule = RULES.find(({ parts: needed }) =>
      needed.every((name) => all.some(([known]) => known === name)),
    );
    return make("div", {}, table, rule ? make("p", { class: "quiet rule" }, rule.text) : null);
  }

  return { list, rewards, folded };
})();
