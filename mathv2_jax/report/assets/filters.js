"use strict";
// Which cases a list shows, and in which order: disagreement, stage, words.

report.filters = (() => {
  const { store } = report;
  const column = (name) => store.index.cases[name];

  // How far the generator's own score lies above the verifiers' mean.
  function gap(number) {
    const own = store.half(column("self")[number]);
    const mean = store.mean[number];
    return own === null || mean === null ? null : own - mean;
  }

  // Four times the variance of the votes: 0 where they agree, 1 where half say 0 and half 1.
  function spread(number) {
    const votes = store.votes[number];
    const mean = store.mean[number];
    return votes.length
      ? (4 * votes.reduce((sum, vote) => sum + (vote - mean) ** 2, 0)) / votes.length
      : null;
  }

  function labelsDiffer(number) {
    const auto = column("auto")[number];
    const person = column("person")[number];
    return auto !== null && person !== null && auto !== person;
  }

  const isUnread = (number) => ![null, 0].includes(column("outcome")[number]);

  const KINDS = {
    above: { title: "self-score above verifiers", test: (number) => gap(number) > 0, order: "gap" },
    split: { title: "votes split", test: (number) => spread(number) > 0, order: "spread" },
    labels: { title: "auto ≠ expert label", test: labelsDiffer, order: "made" },
    refined: {
      title: "refined",
      test: (number) => column("parents")[number].length > 0,
      order: "made",
    },
    unread: { title: "unreadable or cut", test: isUnread, order: "made" },
  };

  const last = (value) => (value === null ? -Infinity : value);
  const ORDERS = {
    made: { title: "as made", key: null },
    gap: { title: "widest gap first", key: (number) => last(gap(number)) },
    spread: { title: "most split first", key: (number) => last(spread(number)) },
    best: { title: "highest mean first", key: (number) => last(store.mean[number]) },
    worst: {
      title: "lowest mean first",
      key: (number) => (store.mean[number] === null ? -Infinity : -store.mean[number]),
    },
    reward: { title: "highest reward first", key: (number) => last(column("total")[number]) },
  };

  // Every word must stand in the id, the problem's id or its statement.
  function wordsOf(query) {
    return query.toLowerCase().split(/\s+/).filter(Boolean);
  }

  let haystacks = null; // a problem's id, statement and source, in small letters

  function ofProblem(problem) {
    if (haystacks === null) {
      const { id, statement, source } = store.index.problems;
      haystacks = id.map((name, at) => `${name}\n${statement[at]}\n${source[at]}`.toLowerCase());
    }
    return haystacks[problem];
  }

  function problems(query) {
    const words = wordsOf(query);
    const all = Array.from({ length: store.numProblems }, (_, number) => number);
    return words.length
      ? all.filter((number) => words.every((word) => ofProblem(number).includes(word)))
      : all;
  }

  // `asked`: { q, kinds: [...], stage, order }; `also` are cases found by their texts.
  function cases(asked, also = new Set()) {
    const tests = asked.kinds.map((name) => KINDS[name].test);
    const stage = asked.stage === "" ? -1 : store.index.stages.indexOf(asked.stage);
    const words = wordsOf(asked.q);
    const found = [];
    for (let number = 0; number < store.numCases; number += 1) {
      if (asked.stage !== "" && column("stage")[number] !== stage) continue;
      if (!tests.every((test) => test(number))) continue;
      if (words.length && !also.has(number) && !named(number, words)) continue;
      found.push(number);
    }
    return sorted(found, asked.order);
  }

  function named(number, words) {
    const own = column("id")[number].toLowerCase();
    const about = ofProblem(column("problem")[number]);
    return words.every((word) => own.includes(word) || about.includes(word));
  }

  function sorted(numbers, order) {
    const { key } = ORDERS[order];
    if (key === null) return numbers;
    const keys = new Map(numbers.map((number) => [number, key(number)]));
    return numbers.sort((one, other) => keys.get(other) - keys.get(one) || one - other);
  }

  // Reads every chunk of texts for the words; `found` is told of each chunk's cases as it comes.
  // Ends early where `isOver` says so.
  async function texts(query, isOver, found) {
    const words = wordsOf(query);
    const byChunk = new Map();
    column("chunk").forEach((chunk, number) => {
      if (!byChunk.has(chunk)) byChunk.set(chunk, []);
      byChunk.get(chunk).push(number);
    });
    let done = 0;
    for (const [chunk, numbers] of byChunk) {
      const entries = await store.load(store.index.chunks[chunk]);
      if (isOver()) return;
      done += 1;
      found(
        numbers.filter((number) => holds(entries[column("place")[number]], words)),
        done,
        byChunk.size,
      );
    }
  }

  function holds(entry, words) {
    const text = `${entry.text}\n${entry.self}`.toLowerCase();
    return words.every((word) => text.includes(word));
  }

  const count = (name) =>
    column("id").reduce((sum, _, number) => sum + KINDS[name].test(number), 0);

  return { KINDS, ORDERS, gap, spread, labelsDiffer, isUnread, problems, cases, texts, count };
})();
