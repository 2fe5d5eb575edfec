"use strict";
// One curve a picture: axes with round numbers, and the value under the pointer or the arrow keys.

report.charts = (() => {
  const { make, draw } = report.dom;
  const WIDTH = 290;
  const HEIGHT = 165;
  const LEFT = 50;
  const RIGHT = 10;
  const TOP = 10;
  const BOTTOM = 24;

  function chart(name, steps, values, unit = "step") {
    const known = values.map((value, at) => at).filter((at) => values[at] !== null);
    if (!known.length) return null;
    const scaleX = scale(steps[0], steps.at(-1), LEFT, WIDTH - RIGHT, 4, true);
    const all = known.map((at) => values[at]);
    const scaleY = scale(Math.min(...all), Math.max(...all), HEIGHT - BOTTOM, TOP, 4, false);
    const svg = draw(
      "svg",
      {
        viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
        tabindex: "0",
        role: "img",
        "aria-label": summary(name, steps, values, known, unit),
      },
      ...axes(scaleX, scaleY),
      ...lines(steps, values, scaleX, scaleY),
    );
    const value = make("output", { class: "value" });
    follow(svg, value, { steps, values, known, scaleX, scaleY, unit });
    return make(
      "figure",
      { class: "chart" },
      make("figcaption", {}, make("span", {}, name), value),
      svg,
    );
  }

  // A map from numbers to places, with ticks that are 1, 2 or 5 times a power of ten. Of a `whole`
  // one ticks are whole numbers, and it ends where the numbers do, not at a tick.
  function scale(low, high, from, to, count, whole) {
    if (low === high) {
      const around = Math.abs(low) * 0.1;
      [low, high] = around ? [low - around, high + around] : [0, 1];
    }
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    let step = [1, 2, 5, 10].map((times) => times * power).find((size) => size >= rough);
    if (whole) step = Math.max(1, step);
    if (!whole)
      [low, high] = [Math.floor(low / step + 1e-9) * step, Math.ceil(high / step - 1e-9) * step];
    const ticks = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at += 1)
      ticks.push(at * step);
    const place = (value) => from + ((value - low) / (high - low)) * (to - from);
    return { place, ticks, step };
  }

  function figure(value, step = 0) {
    const size = Math.abs(value);
    if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
    if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
    if (size !== 0 && size < 1e-3 && (step === 0 || step < 1e-3))
      return value.toExponential(1).replace(".0", "");
    return String(
      Number(
        step ? value.toFixed(Math.max(0, Math.ceil(-Math.log10(step)) + 1)) : value.toPrecision(4),
      ),
    );
  }

  function axes(scaleX, scaleY) {
    const parts = [];
    for (const tick of scaleY.ticks) {
      const y = scaleY.place(tick);
      parts.push(draw("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }));
      parts.push(
        draw("text", { x: LEFT - 6, y: y + 3.5, "text-anchor": "end" }, figure(tick, scaleY.step)),
      );
    }
    for (const tick of scaleX.ticks) {
      const x = scaleX.place(tick);
      parts.push(
        draw("line", { class: "axis", x1: x, x2: x, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 4 }),
      );
      parts.push(
        draw("text", { x, y: HEIGHT - 7, "text-anchor": "middle" }, figure(tick, scaleX.step)),
      );
    }
    parts.push(
      draw("line", {
        class: "axis",
        x1: LEFT,
        x2: WIDTH - RIGHT,
        y1: HEIGHT - BOTTOM,
        y2: HEIGHT - BOTTOM,
      }),
    );
    return parts;
  }

  // The curve, broken where values are missing; a value without neighbours is a dot.
  function lines(steps, values, scaleX, scaleY) {
    const parts = [];
    let run = [];
    const close = () => {
      if (run.length === 1)
        parts.push(draw("circle", { class: "dot", cx: run[0][0], cy: run[0][1], r: 3 }));
      else if (run.length)
        parts.push(
          draw("polyline", {
            class: "curve",
            points: run.map((point) => point.join(",")).join(" "),
          }),
        );
      run = [];
    };
    values.forEach((value, at) => {
      if (value === null) close();
      else run.push([round(scaleX.place(steps[at])), round(scaleY.place(value))]);
    });
    close();
    return parts;
  }

  const round = (place) => Math.round(place * 100) / 100;

  function summary(name, steps, values, known, unit) {
    const first = known[0];
    const last = known.at(-1);
    return `${name}: ${figure(values[first])} at ${unit} ${steps[first]}, ${figure(values[last])} at ${unit} ${steps[last]}. Arrow keys read its values.`;
  }

  function follow(svg, output, { steps, values, known, scaleX, scaleY, unit }) {
    const dot = draw("circle", { class: "dot", r: 3.5, visibility: "hidden" });
    svg.append(dot);
    let at = known.length - 1;
    const rest = () => {
      dot.setAttribute("visibility", "hidden");
      output.textContent = figure(values[known.at(-1)]);
    };
    const show = () => {
      const number = known[at];
      dot.setAttribute("visibility", "visible");
      dot.setAttribute("cx", round(scaleX.place(steps[number])));
      dot.setAttribute("cy", round(scaleY.place(values[number])));
      output.textContent = `${figure(values[number])} · ${unit} ${steps[number].toLocaleString("en")}`;
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * WIDTH;
      at = nearest(
        known.map((number) => scaleX.place(steps[number])),
        x,
      );
      show();
    });
    svg.addEventListener("pointerleave", rest);
    svg.addEventListener("focus", show);
    svg.addEventListener("blur", rest);
    svg.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      at = Math.max(0, Math.min(known.length - 1, at + by));
      show();
    });
    rest();
  }

  function nearest(places, x) {
    let best = 0;
    places.forEach((place, at) => {
      if (Math.abs(place - x) < Math.abs(places[best] - x)) best = at;
    });
    return best;
  }

  return { chart };
})();
