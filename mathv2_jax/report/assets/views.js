"use strict";
// The views but that of a proof. A view is { node, title } and what the keys do in it: `list`,
// `move`, `turn`; `up` is the address that Escape goes to where nothing was opened before.

report.views = (() => {
  const { store, filters, mathematics, list } = report;
  const { make, address, number, counted } = report.dom;
  const { facts, where } = report.scores;

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
      .map(([title, text]) => report.remarks.folded(title, () => mathematics.prose(text)));
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
    const search = report.search(asked, shown, status);
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

  return { problems, problem, proofs, proof, missing };
})();
