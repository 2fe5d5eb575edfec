// Run in a page of the report by tools/check_report.py.
// Differences of random words lead from one to the other, and are as short as can be; the pieces of
// random texts are the texts. Returns what is wrong, or how long the slowest of some texts took that
// are made to be slow, in milliseconds.
let state = 1;
const random = (below) => (state = (state * 48271) % 2147483647) % below;
const drawn = (most, from) => Array.from({ length: random(most) }, () => from[random(from.length)]);
const MARKS = [
  "\\",
  "(",
  ")",
  "[",
  "]",
  "$",
  "$$",
  "{",
  "}",
  "a",
  "1",
  "\n",
  " ",
  "\\boxed{",
  "**",
  "# ",
];
const SLOW = [
  "$",
  "$a",
  "\\(",
  "\\[",
  "\\(\\)",
  "\\boxed{",
  "\\begin{align}",
  "**",
  "`",
  "# ",
  "\n\n",
  "a ",
];

// The length of the longest common subsequence.
function common(one, other) {
  let row = new Array(other.length + 1).fill(0);
  for (const word of one) {
    const next = [0];
    other.forEach((each, at) => {
      next.push(each === word ? row[at] + 1 : Math.max(row[at + 1], next[at]));
    });
    row = next;
  }
  return row.at(-1);
}

for (let turn = 0; turn < 500; turn += 1) {
  const [old, fresh] = [drawn(30, "abc"), drawn(30, "abc")];
  const runs = report.difference.runs(old, fresh);
  const of = (...kinds) =>
    runs.filter((run) => kinds.includes(run.kind)).flatMap((run) => run.items);
  if (of("same", "del").join() !== old.join()) return `what was before ${old} and ${fresh}`;
  if (of("same", "ins").join() !== fresh.join()) return `what came of ${old} and ${fresh}`;
  if (of("same").length !== common(old, fresh)) return `not the shortest: ${old} and ${fresh}`;
  const text = drawn(60, MARKS).join("");
  const pieces = report.mathematics.pieces(text).map((each) => each.source);
  if (pieces.join("") !== text) return `the pieces of ${text}`;
}

let slowest = 0;
for (const part of SLOW) {
  const began = performance.now();
  report.mathematics.prose(part.repeat(100000));
  report.difference.byWords(part.repeat(20000), `${part.repeat(10000)}b${part.repeat(10001)}`);
  slowest = Math.max(slowest, performance.now() - began);
}
return slowest;
