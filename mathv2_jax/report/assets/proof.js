"use strict";
// One proof: its text or what changed in it, its reward, and everything that was said about it.

report.proof = (() => {
  const { store, filters, mathematics, difference } = report;
  const { make, address, number } = report.dom;
  const { badge, bar, fact } = report.scores;
  const MODES = [
    { name: "proof", title: "Proof" },
    { name: "words", title: "Changed words" },
    { name: "lines", title: "Changed lines" },
  ];

  const cases = () => store.index.cases;
  const linkTo = (at, ...content) =>
    make("a", { href: address("proof", cases().id[at]) }, ...content);

  async function view(at) {
    const problem = cases().problem[at];
    const parents = cases().parents[at];
    const [entry, about, ...before] = await Promise.all([
      store.textsOf(cases(), at),
      store.textsOf(store.index.problems, problem),
      ...parents.map((parent) => store.textsOf(cases(), parent)),
    ]);
    const reading = text(at, entry, parents, before);
    const said = report.remarks.list(at, entry);
    const node = make(
      "article",
      { class: "proof" },
      heading(at, problem),
      make(
        "section",
        { class: "card statement", "aria-label": "Problem" },
        mathematics.prose(about.statement),
      ),
      make(
        "div",
        { class: "columns" },
        make("div", { class: "main" }, reading.node, said.node),
        aside(at, entry),
      ),
    );
    return { node, turn: reading.turn, move: said.move };
  }

  function heading(at, problem) {
    const { id, cases: counts } = store.index.problems;
    const among = `${number(at - store.firstCase[problem] + 1)} of ${counts[problem]}`;
    return make(
      "header",
      { class: "heading" },
      make(
        "p",
        { class: "trail" },
        make(
          "a",
          { href: address("problem", id[problem]) },
          "Problem ",
          make("code", {}, id[problem]),
        ),
        ` · proof ${among}`,
      ),
      make("h1", {}, report.scores.where(at)),
      make("p", { class: "facts" }, ...report.scores.facts(at)),
    );
  }

  // The text, or its difference from one of the proofs that it refines.
  function text(at, entry, parents, before) {
    const earlier = parents.map((parent, place) => ({
      title: report.scores.where(parent),
      text: before[place].text,
    }));
    if (!earlier.length && entry.shown?.proof)
      earlier.push({ title: "the proof of its prompt", text: entry.shown.proof });
    const body = make("div", { class: "body" });
    const modes = earlier.length ? MODES : MODES.slice(0, 1);
    let mode = 0;
    let against = 0;
    const buttons = modes.map(({ title }, place) =>
      make(
        "button",
        { type: "button", "aria-pressed": "false", onclick: () => show(place) },
        title,
      ),
    );
    const chosen = make(
      "select",
      {
        "aria-label": "Compared with",
        onchange: (event) => show(mode, event.target.selectedIndex),
      },
      ...earlier.map(({ title }) => make("option", {}, `since ${title}`)),
    );

    function show(place, other = against) {
      mode = place;
      against = other;
      buttons.forEach((button, each) => button.setAttribute("aria-pressed", String(each === mode)));
      chosen.hidden = mode === 0;
      const old = earlier[against]?.text;
      if (MODES[mode].name === "proof") body.replaceChildren(mathematics.prose(entry.text));
      else if (old === entry.text)
        body.replaceChildren(make("p", { class: "quiet" }, "Nothing was changed."));
      else
        body.replaceChildren(
          MODES[mode].name === "words"
            ? difference.byWords(old, entry.text)
            : difference.byLines(old, entry.text),
        );
    }

    show(0);
    const unread = cases().outcome[at]
      ? make(
          "p",
          { class: "note" },
          "No proof could be read from this response; it is shown whole.",
        )
      : null;
    const bars = earlier.length
      ? make(
          "div",
          { class: "modes", role: "group", "aria-label": "View of the proof" },
          ...buttons,
          chosen,
        )
      : null;
    const thinking = entry.thinking
      ? report.remarks.folded("Thinking before it", () => mathematics.prose(entry.thinking))
      : null;
    return {
      node: make(
        "section",
        { class: "card", "aria-label": "Proof" },
        make("h2", {}, "Proof"),
        bars,
        unread,
        body,
        thinking,
      ),
      turn: () => show((mode + 1) % modes.length),
    };
  }

  function aside(at, entry) {
    const advantage = cases().advantage[at];
    return make(
      "aside",
      { "aria-label": "Scores and origin" },
      scores(at),
      entry.rewards.length
        ? make("section", { class: "card" }, report.remarks.rewards(entry.rewards, advantage))
        : null,
      entry.labels.length
        ? make("section", { class: "card" }, make("h2", {}, "Labels"), ...entry.labels.map(label))
        : null,
      rounds(at, entry),
      origin(at, entry),
    );
  }

  function scores(at) {
    const gap = filters.gap(at);
    const own = store.half(cases().self[at]);
    const meta = store.scoresOf(cases().metas[at]);
    if (own === null && !store.votes[at].length) return null;
    return make(
      "section",
      { class: "card" },
      make("h2", {}, "Scores"),
      make(
        "p",
        { class: "facts" },
        own === null ? null : fact("self", badge(own)),
        fact("verifiers", bar(store.votes[at])),
      ),
      meta.length ? make("p", { class: "facts" }, fact("meta-verifiers", bar(meta))) : null,
      gap > 0
        ? make("p", { class: "note" }, `Its own score is ${number(gap)} above the verifiers'.`)
        : null,
      filters.labelsDiffer(at)
        ? make("p", { class: "note" }, "The auto label and the expert's differ.")
        : null,
    );
  }

  function label(each) {
    const who = [each.rater, each.rubric, each.scale].filter(Boolean).join(" · ");
    return make(
      "div",
      { class: "label" },
      make(
        "p",
        { class: "facts" },
        badge(each.score),
        make("strong", {}, each.source),
        make("span", { class: "quiet" }, who),
      ),
      each.votes.length ? make("p", { class: "facts" }, fact("made of", bar(each.votes))) : null,
      each.comment ? mathematics.prose(each.comment) : null,
    );
  }

  // What it refines, all the way back, and what refines it.
  function rounds(at, entry) {
    const before = ancestors(at);
    const after = store.children.get(at) ?? [];
    if (before.length < 1 && !after.length && !entry.parents.length) return null;
    const row = (each) =>
      make("li", {}, linkTo(each, report.scores.where(each)), " ", bar(store.votes[each]));
    const here = make(
      "li",
      { "aria-current": "true" },
      make("strong", {}, report.scores.where(at)),
      " ",
      bar(store.votes[at]),
    );
    const shown = after.slice(0, 12).map(row);
    const analyses = entry.shown?.analysis
      ? report.remarks.folded("The analysis it was shown", () =>
          mathematics.prose(entry.shown.analysis),
        )
      : null;
    return make(
      "section",
      { class: "card" },
      make("h2", {}, "Refinement"),
      make("ol", { class: "rounds" }, ...before.map(row), here, ...shown),
      after.length > shown.length
        ? make("p", { class: "quiet" }, `and ${after.length - shown.length} more`)
        : null,
      analyses,
    );
  }

  // The first parents, the eldest first.
  function ancestors(at) {
    const found = [];
    for (
      let next = cases().parents[at][0];
      next !== undefined && !found.includes(next);
      next = cases().parents[next][0]
    )
      found.unshift(next);
    return found;
  }

  function origin(at, entry) {
    const known = [
      ["id", make("code", {}, cases().id[at])],
      ["written by", entry.checkpoint],
      ["tokens", cases().tokens[at] === null ? "" : number(cases().tokens[at])],
      ["ended by", entry.finish],
    ].filter(([, value]) => value);
    return make(
      "section",
      { class: "card" },
      make("h2", {}, "Origin"),
      make(
        "dl",
        { class: "origin" },
        ...known.map(([name, value]) =>
          make("div", {}, make("dt", {}, name), make("dd", {}, value)),
        ),
      ),
    );
  }

  return { view, linkTo };
})();
