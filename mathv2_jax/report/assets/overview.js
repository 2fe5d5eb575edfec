"use strict";
// The run as a whole: what it holds, where to look, and its curves.

report.overview = (() => {
  const { store, filters, charts } = report;
  const { make, address, number, counted } = report.dom;

  async function overview() {
    const { index } = store;
    const { training, search } = await store.load("curves");
    const kinds = Object.entries(filters.KINDS).map(([kind, { title }]) =>
      make(
        "li",
        {},
        make(
          "a",
          { href: address("proofs", null, { kinds: kind }) },
          make("strong", {}, number(filters.count(kind))),
          make("span", {}, title),
        ),
      ),
    );
    const remarks = (index.cases.remarks ?? []).reduce((sum, count) => sum + count, 0);
    const node = make(
      "article",
      { class: "overview" },
      make("h1", {}, index.name),
      make(
        "p",
        { class: "lead" },
        `${counted(store.numProblems, "problem")}, ${counted(store.numCases, "proof")}, ${counted(remarks, "analysis", "analyses")}.`,
      ),
      store.numCases ? make("h2", {}, "Where to look") : null,
      store.numCases
        ? make("ul", { class: "tiles" }, ...kinds)
        : make("p", { class: "quiet" }, "This run has written no proof yet."),
      measured(training, search),
      stages(),
    );
    return { node, title: "Overview", up: null };
  }

  // A search's curves, or those of the last stage that has a reward.
  function measured(training, search) {
    const shown =
      search ??
      training.findLast(({ scalars }) => scalars.some(([name]) => name === "reward")) ??
      training.at(-1);
    if (shown === undefined) return null;
    const first = [...shown.scalars]
      .sort(([one], [other]) => other.startsWith("reward") - one.startsWith("reward"))
      .slice(0, 4);
    const unit = shown === search ? "round" : "step";
    const pictures = first
      .map(([name, values]) => charts.chart(name, shown.steps, values, unit))
      .filter(Boolean);
    const all = make("a", { href: address("curves", null, { stage: shown.name }) }, "all curves");
    return make(
      "section",
      {},
      make("h2", {}, `${shown.name} `, make("span", { class: "quiet" }, all)),
      make("div", { class: "charts" }, ...pictures),
    );
  }

  // Proofs by stage: how many, and their mean scores.
  function stages() {
    const { cases, stages: names } = store.index;
    if (!store.numCases) return null;
    const inOrder = [...names].sort((one, other) =>
      one.localeCompare(other, "en", { numeric: true }),
    );
    const rows = inOrder.map((name) => {
      const stage = names.indexOf(name);
      const own = cases.id.map((_, at) => at).filter((at) => cases.stage[at] === stage);
      const parsed = own.filter((at) => !filters.isUnread(at));
      const cell = (values) => make("td", {}, number(meanOf(values)));
      return make(
        "tr",
        {},
        make(
          "th",
          { scope: "row" },
          name ? make("a", { href: address("proofs", null, { stage: name }) }, name) : "given",
        ),
        make("td", {}, number(own.length)),
        make("td", {}, own.length ? `${Math.round((100 * parsed.length) / own.length)} %` : "–"),
        cell(own.map((at) => store.half(cases.self[at]))),
        cell(own.map((at) => store.mean[at])),
        cell(own.map((at) => cases.total[at])),
      );
    });
    const head = [
      "proofs from",
      "number",
      "readable",
      "mean self-score",
      "mean of verifiers",
      "mean reward",
    ];
    return make(
      "section",
      {},
      make("h2", {}, "Proofs"),
      make(
        "div",
        { class: "wide" },
        make(
          "table",
          { class: "table" },
          make(
            "thead",
            {},
            make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name))),
          ),
          make("tbody", {}, ...rows),
        ),
      ),
    );
  }

  function meanOf(values) {
    const known = values.filter((value) => value !== null);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  }

  async function curves(query) {
    const { training, search } = await store.load("curves");
    const all = [
      ...(search ? [{ ...search, unit: "round" }] : []),
      ...training.map((stage) => ({ ...stage, unit: "step" })),
    ];
    const node = make("article", { class: "curves" }, make("h1", {}, "Curves"));
    if (!all.length)
      node.append(make("p", { class: "quiet" }, "This run has measured nothing yet."));
    const shown =
      all.find((stage) => stage.name === query.get("stage")) ??
      all.find((stage) => stage.unit === "round") ??
      all.at(-1);
    if (all.length > 1) {
      const links = all.map((stage) =>
        make(
          "a",
          {
            href: address("curves", null, { stage: stage.name }),
            "aria-current": stage === shown ? "page" : null,
          },
          stage.name,
        ),
      );
      node.append(make("nav", { class: "stages", "aria-label": "Stages" }, ...links));
    }
    if (shown) node.append(...drawn(shown));
    return { node, title: "Curves", up: address("") };
  }

  function drawn({ name, steps, scalars, every, unit }) {
    const note = [
      `${counted(steps.length * every, unit)} of ${name}`,
      every > 1 ? `each point is the mean of ${every} ${unit}s` : "",
    ]
      .filter(Boolean)
      .join("; ");
    const pictures = scalars
      .map(([scalar, values]) => charts.chart(scalar, steps, values, unit))
      .filter(Boolean);
    return [
      make("p", { class: "quiet" }, `${note}.`),
      make("div", { class: "charts" }, ...pictures),
    ];
  }

  return { overview, curves };
})();
