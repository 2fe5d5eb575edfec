"use strict";
// What the data scripts hand over. Texts come when they are asked for, a script for each chunk.
// Ids and texts are never names of fields here: models and files choose them.

const report = {
  accept(kind, name, data) {
    if (kind === "index") report.store.open(data);
    else report.store.arrived(kind === "texts" ? name : kind, data);
  },
};

report.store = (() => {
  const KEPT = 60; // chunks of texts in memory
  const NAME = /^(curves|texts-[0-9a-f]{16})$/;
  const policy = window.trustedTypes?.createPolicy("report", { createScriptURL: address });
  const data = new Map(); // by the name of its script, the latest used last
  const waiting = new Map();

  function address(name) {
    if (!NAME.test(name)) throw new TypeError(`no data script is called ${name}`);
    return `data/${name}.js`;
  }

  function arrived(name, found) {
    data.set(name, found);
    for (const old of data.keys()) {
      if (data.size <= KEPT) break;
      data.delete(old);
    }
  }

  function load(name) {
    if (data.has(name)) {
      const found = data.get(name);
      data.delete(name);
      data.set(name, found);
      return Promise.resolve(found);
    }
    if (!waiting.has(name)) waiting.set(name, fetched(name));
    return waiting.get(name);
  }

  function fetched(name) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      const fail = () =>
        reject(
          new Error(
            `data/${name}.js could not be read. If the report was written anew, reload the page.`,
          ),
        );
      script.onerror = fail;
      script.onload = () => {
        script.remove();
        if (data.has(name)) resolve(data.get(name));
        else fail();
      };
      script.src = policy ? policy.createScriptURL(name) : address(name);
      document.head.append(script);
    }).finally(() => waiting.delete(name));
  }

  const store = { load, arrived, open, index: null };

  function open(index) {
    store.index = index;
    const { problems, cases } = index;
    problems.id ??= [];
    cases.id ??= [];
    store.numProblems = problems.id.length;
    store.numCases = cases.id.length;
    store.problemOf = new Map(problems.id.map((id, number) => [wellFormed(id), number]));
    store.caseOf = new Map(cases.id.map((id, number) => [wellFormed(id), number]));
    store.firstCase = starts(problems.cases ?? []);
    store.votes = (cases.votes ?? []).map(scoresOf);
    store.mean = store.votes.map(mean);
    store.children = childrenOf(cases.parents ?? []);
  }

  function starts(counts) {
    const found = [];
    let at = 0;
    for (const count of counts) {
      found.push(at);
      at += count;
    }
    return found;
  }

  function childrenOf(parents) {
    const found = new Map();
    parents.forEach((all, child) => {
      for (const parent of all) {
        if (!found.has(parent)) found.set(parent, []);
        found.get(parent).push(child);
      }
    });
    return found;
  }

  // An id as addresses hold it: half a surrogate pair cannot stand in one.
  function wellFormed(id) {
    return id.replace(/\p{Surrogate}/gu, "\ufffd");
  }

  // A digit of the index is twice a score.
  function scoresOf(digits) {
    return Array.from(digits, (digit) => Number(digit) / 2);
  }

  function mean(scores) {
    return scores.length ? scores.reduce((sum, score) => sum + score, 0) / scores.length : null;
  }

  store.half = (digit) => (digit === null ? null : digit / 2);
  store.scoresOf = scoresOf;
  store.wellFormed = wellFormed;
  store.casesOf = (problem) =>
    Array.from(
      { length: store.index.problems.cases[problem] },
      (_, at) => store.firstCase[problem] + at,
    );
  store.textsOf = async (columns, number) => {
    const chunk = await load(store.index.chunks[columns.chunk[number]]);
    return chunk[columns.place[number]];
  };
  return store;
})();
