"use strict";
// Texts of mathematics as nodes: formulas by KaTeX, a little Markdown, all else as it stands.
// Whatever a model writes is read in time linear in its length, and yields text nodes, our own
// elements, and what KaTeX draws without links, styles or classes of the author's.

report.mathematics = (() => {
  const { make, put } = report.dom;
  const LONGEST = 10_000; // characters of a formula that are typeset
  const MOST_DRAWN = 2_000; // formulas that are kept as they were drawn
  const PAIRS = [
    { open: "\\(", close: "\\)", display: false },
    { open: "\\[", close: "\\]", display: true },
    { open: "$$", close: "$$", display: true },
  ];
  const ENVIRONMENT = /\\begin\{((?:equation|align|gather)\*?)\}/y;
  const OPTIONS = {
    throwOnError: false,
    errorColor: "var(--bad)",
    trust: false,
    strict: "ignore",
    maxExpand: 500,
    maxSize: 12, // em
  };

  // Pieces of a text in order: { math: null | "inline" | "display", source, formula }.
  function pieces(text) {
    const found = [];
    const closes = new Map();
    const start = /[$\\]/g;
    let plain = 0;
    for (let match = start.exec(text); match; match = start.exec(text)) {
      const piece = formulaAt(text, match.index, closes);
      if (piece === null) {
        if (text[match.index] === "\\") start.lastIndex = match.index + 2;
        continue;
      }
      if (match.index > plain) found.push({ math: null, source: text.slice(plain, match.index) });
      found.push(piece);
      plain = start.lastIndex = match.index + piece.source.length;
    }
    if (plain < text.length) found.push({ math: null, source: text.slice(plain) });
    return found;
  }

  function formulaAt(text, at, closes) {
    for (const { open, close, display } of PAIRS) {
      if (text.startsWith(open, at)) return between(text, at, open.length, close, display, closes);
    }
    if (text[at] === "$") return dollars(text, at, closes);
    if (text.startsWith("\\boxed{", at)) return boxed(text, at);
    ENVIRONMENT.lastIndex = at;
    const environment = ENVIRONMENT.exec(text);
    if (environment === null) return null;
    const close = `\\end{${environment[1]}}`;
    const end = nextOf(text, close, at, closes);
    return end < 0 || end - at > LONGEST ? null : piece(text, at, end + close.length, 0, 0, true);
  }

  // Where `mark` comes next, remembered, so that openings without an end cost one search in all.
  function nextOf(text, mark, from, closes) {
    const known = closes.get(mark);
    if (known !== undefined && (known < 0 || known >= from)) return known;
    const end = text.indexOf(mark, from);
    closes.set(mark, end);
    return end;
  }

  function between(text, at, opening, close, display, closes) {
    const end = nextOf(text, close, at + opening, closes);
    if (end < 0 || end - at > LONGEST || end === at + opening) return null;
    return piece(text, at, end + close.length, opening, close.length, display);
  }

  function piece(text, at, end, opening, closing, display) {
    const source = text.slice(at, end);
    const formula = source.slice(opening, source.length - closing);
    return { math: display ? "display" : "inline", source, formula };
  }

  // As in Pandoc: no space after the first dollar or before the last, and no digit after it.
  function dollars(text, at, closes) {
    if (/[\s$]/.test(text[at + 1] ?? " ")) return null;
    let end = nextOf(text, "$", at + 1, closes);
    while (end > 0 && text[end - 1] === "\\") end = nextOf(text, "$", end + 1, closes);
    if (end < 0 || end - at > LONGEST) return null;
    if (/\s/.test(text[end - 1]) || /\d/.test(text[end + 1] ?? "")) return null;
    const found = piece(text, at, end + 1, 1, 1, false);
    return /\n\s*\n/.test(found.formula) ? null : found;
  }

  // The box of a verdict stands outside of formulas.
  function boxed(text, at) {
    const end = text.slice(at, at + 200).search(/\}(?!\})/);
    return end < 0 ? null : piece(text, at, at + end + 1, 0, 0, false);
  }

  const drawn = new Map(); // formulas by display and source: lists and proofs repeat them

  function typeset(each) {
    const key = `${each.math} ${each.source}`;
    let node = drawn.get(key);
    if (node === undefined) {
      if (drawn.size >= MOST_DRAWN) drawn.clear();
      node = typesetAnew(each);
      drawn.set(key, node);
    }
    return node.cloneNode(true);
  }

  function typesetAnew({ math, source, formula }) {
    const display = math === "display";
    const node = make("span", { class: display ? "formula display" : "formula" });
    if (window.katex === undefined || formula.length > LONGEST) {
      node.append(source);
      return node;
    }
    try {
      window.katex.render(formula, node, { ...OPTIONS, displayMode: display });
    } catch {
      node.replaceChildren(source); // nested too deeply for KaTeX, or another limit of its own
    }
    return node;
  }

  // The text as paragraphs.
  function prose(text) {
    const node = make("div", { class: "prose" });
    for (const paragraph of paragraphs(text)) node.append(written(paragraph));
    return node;
  }

  // Lists of pieces, cut where a text piece has an empty line or a heading's line.
  function paragraphs(text) {
    const found = [[]];
    for (const each of pieces(text)) {
      if (each.math !== null) {
        found.at(-1).push(each);
        continue;
      }
      each.source.split(/\n[ \t]*\n\s*|\n(?=#{1,4} )/).forEach((source, at) => {
        if (at > 0) found.push([]);
        const heading = found.at(-1).length === 0 && /^#{1,4} .*\n/.exec(source);
        if (heading) {
          found.at(-1).push({ math: null, source: heading[0].trimEnd() });
          found.push([]);
          source = source.slice(heading[0].length);
        }
        if (source) found.at(-1).push({ math: null, source });
      });
    }
    return found.filter((all) => all.some((each) => each.math !== null || each.source.trim()));
  }

  function written(paragraph) {
    const heading = paragraph[0].math === null && /^#{1,4} /.exec(paragraph[0].source);
    const first = heading
      ? { math: null, source: paragraph[0].source.slice(heading[0].length) }
      : paragraph[0];
    return make(
      "p",
      { class: heading ? "heading" : null },
      inline([first].concat(paragraph.slice(1))),
    );
  }

  // Nodes of one paragraph: formulas, `code`, and what stands between two **.
  function inline(all) {
    const marks = all.reduce(
      (sum, each) => sum + (each.math ? 0 : each.source.split("**").length - 1),
      0,
    );
    const nodes = [];
    let seen = 0;
    let strong = null;
    const add = (more) => {
      if (strong) put(strong, more);
      else more.forEach((node) => nodes.push(node));
    };
    all.forEach((each, at) => {
      if (each.math !== null) {
        add([typeset(each)]);
        return;
      }
      const source = trimmed(each.source, all[at - 1], all[at + 1]);
      source.split("**").forEach((part, place) => {
        if (place > 0) {
          seen += 1;
          if (seen === marks && marks % 2 === 1) add(["**"]);
          else if (strong) strong = null;
          else nodes.push((strong = make("strong")));
        }
        add(codes(part));
      });
    });
    return nodes;
  }

  // A displayed formula brings its own line breaks.
  function trimmed(source, before, after) {
    if (before?.math === "display") source = source.replace(/^[ \t]*\n?[ \t]*/, "");
    if (after?.math === "display") source = source.replace(/\n[ \t]*$/, "");
    return source;
  }

  function codes(text) {
    return text
      .split(/(`[^`\n]{1,400}`)/)
      .map((part, at) => (at % 2 ? make("code", {}, part.slice(1, -1)) : part));
  }

  // A text on one line, for lists: its beginning, without structure.
  function line(text, length = 240) {
    const cut = text.length > length ? `${text.slice(0, length)}…` : text;
    const node = make("span", { class: "line" });
    for (const each of pieces(cut.replace(/\s+/g, " "))) {
      node.append(each.math === null ? each.source : typeset({ ...each, math: "inline" }));
    }
    return node;
  }

  return { pieces, typeset, prose, line };
})();
