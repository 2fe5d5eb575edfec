"use strict";
// What changed between two texts: by words, where a formula is one word, or by lines.

report.difference = (() => {
  const { make, put } = report.dom;
  const { pieces, typeset } = report.mathematics;
  const MOST_EDITS = 2_000; // beyond, the differing middle counts as replaced as a whole
  const CONTEXT = 2; // equal lines that are shown around a change

  // Runs { kind: "same" | "del" | "ins", items } that lead from `before` to `after`.
  function runs(before, after) {
    let head = 0;
    const least = Math.min(before.length, after.length);
    while (head < least && before[head] === after[head]) head += 1;
    let tail = 0;
    while (tail < least - head && before.at(-1 - tail) === after.at(-1 - tail)) tail += 1;
    const old = before.slice(head, before.length - tail);
    const fresh = after.slice(head, after.length - tail);
    return joined([
      { kind: "same", items: before.slice(0, head) },
      ...middle(old, fresh),
      { kind: "same", items: before.slice(before.length - tail) },
    ]);
  }

  // Myers, "An O(ND) difference algorithm": the furthest point of each diagonal, edit by edit.
  function middle(old, fresh) {
    const most = Math.min(old.length + fresh.length, MOST_EDITS);
    const reached = new Int32Array(2 * most + 3);
    const trace = [];
    for (let edits = 0; edits <= most; edits += 1) {
      trace.push(reached.slice(most + 1 - edits - 1, most + 1 + edits + 2));
      for (let k = -edits; k <= edits; k += 2) {
        const down = k === -edits || (k !== edits && reached[most + k] < reached[most + k + 2]);
        let x = down ? reached[most + k + 2] : reached[most + k] + 1;
        while (x < old.length && x - k < fresh.length && old[x] === fresh[x - k]) x += 1;
        reached[most + 1 + k] = x;
        if (x >= old.length && x - k >= fresh.length) return path(old, fresh, trace);
      }
    }
    return [
      { kind: "del", items: old },
      { kind: "ins", items: fresh },
    ];
  }

  function path(old, fresh, trace) {
    const found = [];
    let x = old.length;
    let y = fresh.length;
    for (let edits = trace.length - 1; edits > 0; edits -= 1) {
      const reached = trace[edits]; // its middle, edits + 1, is diagonal 0
      const at = (k) => reached[edits + 1 + k];
      const k = x - y;
      const down = k === -edits || (k !== edits && at(k - 1) < at(k + 1));
      const fromX = at(down ? k + 1 : k - 1);
      const fromY = fromX - (down ? k + 1 : k - 1);
      const begins = down ? fromX : fromX + 1; // of the equal items after the edit
      if (x > begins) found.push({ kind: "same", items: old.slice(begins, x) });
      found.push(
        down ? { kind: "ins", items: [fresh[fromY]] } : { kind: "del", items: [old[fromX]] },
      );
      x = fromX;
      y = fromY;
    }
    if (x > 0) found.push({ kind: "same", items: old.slice(0, x) });
    return found.reverse();
  }

  // Neighbours of a kind are one run; in a change, what was taken out stands first.
  function joined(all) {
    const found = [];
    let gone = [];
    let come = [];
    const close = () => {
      if (gone.length) found.push({ kind: "del", items: gone.flat() });
      if (come.length) found.push({ kind: "ins", items: come.flat() });
      gone = [];
      come = [];
    };
    for (const { kind, items } of all.filter((run) => run.items.length)) {
      if (kind === "del") gone.push(items);
      else if (kind === "ins") come.push(items);
      else {
        close();
        if (found.at(-1)?.kind === "same")
          found.push({ kind, items: found.pop().items.concat(items) });
        else found.push({ kind, items });
      }
    }
    close();
    return found;
  }

  // A space between two changes belongs to both: words replaced in a row read as one change.
  function bridged(all) {
    const found = [];
    all.forEach((run, at) => {
      const between =
        at > 0 && at < all.length - 1 && run.kind === "same" && !run.items.join("").trim();
      if (between) found.push({ ...run, kind: "del" }, { ...run, kind: "ins" });
      else found.push(run);
    });
    return joined(found);
  }

  function words(text) {
    return pieces(text).flatMap(({ math, source }) =>
      math === null ? (source.match(/\*\*|\s+|[\p{L}\p{N}]+|[^\s\p{L}\p{N}]/gu) ?? []) : [source],
    );
  }

  function byWords(before, after) {
    const node = make("div", { class: "prose changes" });
    for (const { kind, items } of bridged(runs(words(before), words(after)))) {
      const shown = pieces(items.join("")).map((each) =>
        each.math === null ? each.source.replaceAll("**", "") : typeset(each),
      );
      put(node, kind === "same" ? shown : [make(kind, {}, shown)]);
    }
    return node;
  }

  function byLines(before, after) {
    const node = make("div", { class: "lines", role: "group", "aria-label": "Changed lines" });
    const all = runs(before.split("\n"), after.split("\n"));
    all.forEach(({ kind, items }, at) => {
      if (kind === "same") put(node, unchanged(items, at === 0, at === all.length - 1));
      else
        put(
          node,
          items.map((line) => make(kind, {}, line || " ")),
        );
    });
    return node;
  }

  function unchanged(lines, first, last) {
    const head = first ? 0 : CONTEXT;
    const tail = last ? 0 : CONTEXT;
    const shown = (all) => all.map((line) => make("div", {}, line || " "));
    const hidden = lines.length - head - tail;
    if (hidden < 2) return shown(lines);
    const note = make("div", { class: "skipped" }, `${hidden} equal lines`);
    return [...shown(lines.slice(0, head)), note, ...shown(lines.slice(lines.length - tail))];
  }

  return { runs, byWords, byLines };
})();
