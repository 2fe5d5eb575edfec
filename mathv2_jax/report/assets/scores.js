"use strict";
// Scores, votes and labels as they look everywhere in the report.

report.scores = (() => {
  const { store } = report;
  const { make, number, counted } = report.dom;
  const NAMES = new Map([
    [0, { mark: "0", tone: "bad" }],
    [0.5, { mark: "½", tone: "half" }],
    [1, { mark: "1", tone: "good" }],
  ]);

  // A score in a coloured box; null is a response from which none could be read.
  function badge(score, title = "") {
    const { mark, tone } = NAMES.get(score) ?? { mark: "–", tone: "none" };
    return make("span", { class: `badge ${tone}`, title: title || null }, mark);
  }

  // How votes are shared among the three scores, and their mean.
  function bar(votes) {
    if (!votes.length) return make("span", { class: "quiet" }, "no votes");
    const counts = [...NAMES.keys()].map((score) => votes.filter((vote) => vote === score).length);
    const tones = [...NAMES.values()].map(({ tone }) => tone);
    const said = `${counts[2]} × 1, ${counts[1]} × ½, ${counts[0]} × 0`;
    const parts = [2, 1, 0]
      .filter((at) => counts[at])
      .map((at) => {
        const part = make("span", { class: tones[at] });
        part.style.flexGrow = counts[at];
        return part;
      });
    const mean = votes.reduce((sum, vote) => sum + vote, 0) / votes.length;
    return make(
      "span",
      { class: "votes", title: said },
      make("span", { class: "bar", role: "img", "aria-label": said }, ...parts),
      make("span", {}, `${number(mean)} · ${counted(votes.length, "vote")}`),
    );
  }

  const FAILURES = new Map([
    ["unparseable", "unreadable"],
    ["length", "cut at its limit"],
    ["lost", "lost"],
  ]);

  // Why a response has no score.
  function outcome(name) {
    return make("span", { class: "tag" }, FAILURES.get(name) ?? name);
  }

  function fact(name, ...value) {
    return make("span", { class: "fact" }, make("span", { class: "name" }, name), ...value);
  }

  // What the index knows of a case, short.
  function facts(at) {
    const { cases, outcomes } = store.index;
    const half = (name) => store.half(cases[name][at]);
    const found = [];
    if (cases.outcome[at]) found.push(outcome(outcomes[cases.outcome[at]]));
    else found.push(fact("self", badge(half("self"))));
    if (!cases.outcome[at]) found.push(fact("verifiers", bar(store.votes[at])));
    if (half("auto") !== null) found.push(fact("auto label", badge(half("auto"))));
    if (half("person") !== null) found.push(fact("expert label", badge(half("person"))));
    if (cases.total[at] !== null) found.push(fact("reward", number(cases.total[at])));
    return found;
  }

  function where(at) {
    const { cases, stages } = store.index;
    const stage = stages[cases.stage[at]] || "given";
    if (cases.step[at] === null) return stage;
    const step =
      stage === "search" ? `round ${cases.step[at]}` : `${stage}, step ${cases.step[at]}`;
    return `${step}, no. ${cases.number[at]}`;
  }

  return { badge, bar, outcome, fact, facts, where };
})();
