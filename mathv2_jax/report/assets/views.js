"use strict";
// The views but that of a proof. A view is { node, title } and what the keys do in it: `list`,
// `move`, `turn`; `up` is the address that Escape goes to where nothing was opened before.

report.views = (() => {
  const { store, filters, charts, mathematics, list } = report;
  const { make, address, number, counted } = report.dom;
  const { facts, where } = report.scores;
  const SEARCH_IN_TEXTS_AFTER = 350; // milliseconds without a key

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
    const rows = names.map((name, stage) => {
      const own = cases.id.map((_, at) => at).filter((at) => cases.stage[at] === stage);
      const parsed = own.filter((at) => !filters.isUnread(at));
      const cell = (values) => make("td", {}, number(meanOf(values)));
      return make(
        "tr",
        {},
        make(
          "th",
          { scope: "row" },
          make("a", { href: address("proofs", null, { stage: name }) }, name || "given"),
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

  function problems(query) {
    const { problems: columns } = store.index;
    const status = make("p", { class: "status", role: "status" });
    const row = (at) => [
      mathematics.line(columns.statement[at]),
      make(
        "span",
        { class: "facts" },
        make("span", { class: "quiet" }, columns.source[at]),
        make("span", {}, counted(columns.cases[at], "proof")),
        best(at),
      ),
    ];
    const shown = list({
      label: "Problems",
      row,
      open: (at) => report.page.go(address("problem", columns.id[at])),
    });
    const find = (words) => {
      const found = filters.problems(words);
      status.textContent =
        found.length === store.numProblems
          ? counted(found.length, "problem")
          : `${number(found.length)} of ${counted(store.numProblems, "problem")}`;
      shown.show(found);
    };
    const node = make(
      "article",
      {},
      make("div", { class: "bar-above" }, make("h1", {}, "Problems"), status),
      shown.node,
    );
    return {
      node,
      title: "Problems",
      list: shown,
      find,
      query: "problems",
      ready: () => find(query.get("q") ?? ""),
      up: address(""),
    };
  }

  function best(problem) {
    const means = store
      .casesOf(problem)
      .map((at) => store.mean[at])
      .filter((mean) => mean !== null);
    return means.length ? report.scores.fact("best mean", number(Math.max(...means))) : null;
  }

  async function problem(id) {
    const at = store.problemOf.get(id);
    if (at === undefined) return missing(`There is no problem ${id} in this report.`);
    const { problems: columns } = store.index;
    const about = await store.textsOf(columns, at);
    const extra = [
      ["Reference solution", about.reference],
      ["Answer", about.answer],
      ["Grading guidelines", about.guidelines],
    ]
      .filter(([, text]) => text)
      .map(([title, text]) => report.proof.folded(title, () => mathematics.prose(text)));
    const shown = proofList("Proofs of the problem", (each) => [
      make("span", { class: "line" }, where(each)),
      caseFacts(each),
    ]);
    const node = make(
      "article",
      {},
      make(
        "p",
        { class: "trail" },
        make("a", { href: address("problems") }, "Problems"),
        ` · ${columns.source[at]}`,
      ),
      make("h1", {}, "Problem ", make("code", {}, id)),
      make("section", { class: "card statement" }, mathematics.prose(about.statement), ...extra),
      make("h2", {}, counted(columns.cases[at], "proof")),
      shown.node,
    );
    return {
      node,
      title: "Problem",
      list: shown,
      ready: () => shown.show(store.casesOf(at)),
      up: address("problems"),
    };
  }

  function proofList(label, row) {
    const shown = list({ label, row, open: (at) => report.page.read(at, shown.items) });
    return shown;
  }

  function caseFacts(at) {
    const tags = [];
    if (filters.gap(at) > 0)
      tags.push(make("span", { class: "tag" }, `self +${number(filters.gap(at))}`));
    if (filters.labelsDiffer(at)) tags.push(make("span", { class: "tag" }, "labels differ"));
    if (store.index.cases.parents[at].length)
      tags.push(make("span", { class: "tag calm" }, "refined"));
    return make("span", { class: "facts" }, ...facts(at), ...tags);
  }

  function proofs(query) {
    const { cases, problems: columns, stages: names } = store.index;
    const kinds = (query.get("kinds") ?? "")
      .split(" ")
      .filter((kind) => Object.hasOwn(filters.KINDS, kind));
    const asked = {
      q: query.get("q") ?? "",
      kinds,
      stage: names.includes(query.get("stage")) ? query.get("stage") : "",
      order: Object.hasOwn(filters.ORDERS, query.get("order") ?? "")
        ? query.get("order")
        : kinds.length
          ? filters.KINDS[kinds[0]].order
          : "made",
    };
    const row = (at) => [
      make(
        "span",
        { class: "line" },
        make("span", { class: "quiet" }, `${where(at)}  `),
        ...mathematics.line(columns.statement[cases.problem[at]]).childNodes,
      ),
      caseFacts(at),
    ];
    const shown = proofList("Proofs", row);
    const status = make("p", { class: "status", role: "status" });
    const search = searching(asked, shown, status);
    const change = (changes) =>
      report.page.replace(address("proofs", null, plain({ ...asked, ...changes })));
    const node = make(
      "article",
      {},
      make("div", { class: "bar-above" }, make("h1", {}, "Proofs"), status),
      tools(asked, change),
      shown.node,
    );
    return {
      node,
      title: "Proofs",
      list: shown,
      find: search.find,
      query: "proofs",
      ready: () => search.find(asked.q),
      leave: search.leave,
      up: address(""),
    };
  }

  const plain = ({ q, kinds, stage, order }) => ({ q, kinds: kinds.join(" "), stage, order });

  function tools(asked, change) {
    const buttons = Object.entries(filters.KINDS).map(([kind, { title, order }]) => {
      const on = asked.kinds.includes(kind);
      const kinds = on ? asked.kinds.filter((each) => each !== kind) : [...asked.kinds, kind];
      const press = () => change({ kinds, order: on ? "made" : order });
      return make(
        "button",
        { type: "button", "aria-pressed": String(on), "data-kind": kind, onclick: press },
        title,
      );
    });
    const option = (value, title, chosen) =>
      make("option", { value, selected: value === chosen }, title);
    const stage = make(
      "select",
      { "aria-label": "Stage", onchange: (event) => change({ stage: event.target.value }) },
      option("", "all stages", asked.stage),
      ...store.index.stages.filter(Boolean).map((name) => option(name, name, asked.stage)),
    );
    const order = make(
      "select",
      { "aria-label": "Order", onchange: (event) => change({ order: event.target.value }) },
      ...Object.entries(filters.ORDERS).map(([name, { title }]) =>
        option(name, title, asked.order),
      ),
    );
    return make(
      "div",
      { class: "tools", role: "group", "aria-label": "Filters" },
      ...buttons,
      stage,
      order,
    );
  }

  // Ids and statements at once, then the texts of proofs, chunk by chunk.
  function searching(asked, shown, status) {
    let search = 0;
    let waiting = 0;

    function say(found, words, progress = "") {
      const all =
        found.length === store.numCases
          ? counted(found.length, "proof")
          : `${number(found.length)} of ${counted(store.numCases, "proof")}`;
      status.textContent = words && progress ? `${all} · ${progress}` : all;
    }

    function find(words) {
      search += 1;
      window.clearTimeout(waiting);
      asked.q = words;
      const also = new Set();
      const found = filters.cases(asked, also);
      shown.show(found);
      say(found, words, "searching the texts …");
      if (words.trim())
        waiting = window.setTimeout(() => inTexts(words, also, search), SEARCH_IN_TEXTS_AFTER);
    }

    async function inTexts(words, also, own) {
      const isOver = () => own !== search;
      try {
        await filters.texts(words, isOver, (numbers, done, all) => {
          const before = also.size;
          numbers.forEach((at) => also.add(at));
          const over = done === all;
          if (also.size > before || over) {
            const found = filters.cases(asked, also);
            if (found.length !== shown.items.length) shown.show(found, shown.selected);
            say(
              found,
              words,
              over ? "" : `${Math.round((100 * done) / all)} % of the texts searched`,
            );
          }
        });
      } catch (error) {
        if (!isOver()) status.textContent = error.message;
      }
    }

    const leave = () => {
      search += 1;
      window.clearTimeout(waiting);
    };
    return { find, leave };
  }

  async function proof(id) {
    const at = store.caseOf.get(id);
    if (at === undefined) return missing(`There is no proof ${id} in this report.`);
    const shown = await report.proof.view(at);
    const { problems: columns, cases } = store.index;
    return {
      ...shown,
      title: where(at),
      at,
      up: address("problem", columns.id[cases.problem[at]]),
    };
  }

  function missing(what) {
    return {
      node: make("article", {}, make("h1", {}, "Not found"), make("p", {}, what)),
      title: "Not found",
      up: address(""),
    };
  }

  return { overview, curves, problems, problem, proofs, proof, missing };
})();
