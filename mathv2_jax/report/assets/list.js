"use strict";
// A list of any length: only the rows near the window are in the page. One row is selected.

report.list = (() => {
  const { make } = report.dom;
  const MARGIN = 6; // rows beyond either edge

  // `row(item)` is the content of an item's row, `open(item)` what Enter and a click do.
  function list({ label, row, open }) {
    const node = make("div", {
      class: "list",
      role: "listbox",
      tabindex: "0",
      "aria-label": label,
    });
    const canvas = make("div", { class: "canvas", role: "presentation" });
    node.append(canvas);
    let items = [];
    let selected = 0;
    let drawn = new Map();

    const height = () => parseFloat(window.getComputedStyle(node).getPropertyValue("--row")) || 64;

    function show(fresh, keep = 0) {
      items = fresh;
      selected = Math.min(keep, Math.max(items.length - 1, 0));
      canvas.replaceChildren();
      drawn = new Map();
      draw();
    }

    function draw() {
      if (!node.isConnected) return;
      const size = height();
      canvas.style.height = `${items.length * size}px`;
      const top = -canvas.getBoundingClientRect().top;
      const first = Math.max(0, Math.floor(top / size) - MARGIN);
      const end = Math.min(items.length, Math.ceil((top + window.innerHeight) / size) + MARGIN);
      for (const [at, element] of drawn) {
        if (at < first || at >= end) {
          element.remove();
          drawn.delete(at);
        }
      }
      for (let at = first; at < end; at += 1) place(at, size);
      mark();
    }

    function place(at, size) {
      let element = drawn.get(at);
      if (element === undefined) {
        element = make(
          "div",
          {
            class: "row",
            role: "option",
            id: `row-${at}`,
            "aria-setsize": items.length,
            "aria-posinset": at + 1,
          },
          row(items[at]),
        );
        element.addEventListener("click", () => choose(at));
        drawn.set(at, element);
        canvas.append(element);
      }
      element.style.top = `${at * size}px`;
    }

    function mark() {
      for (const [at, element] of drawn)
        element.setAttribute("aria-selected", String(at === selected));
      if (drawn.has(selected)) node.setAttribute("aria-activedescendant", `row-${selected}`);
      else node.removeAttribute("aria-activedescendant");
    }

    function choose(at) {
      selected = at;
      mark();
      if (at < items.length) open(items[at]);
    }

    function move(by) {
      if (!items.length) return;
      selected = Math.max(0, Math.min(items.length - 1, selected + by));
      node.focus({ preventScroll: true });
      const size = height();
      const top = canvas.getBoundingClientRect().top + selected * size;
      const covered = document.querySelector(".top").getBoundingClientRect().bottom;
      if (top < covered) window.scrollBy(0, top - covered - 8);
      else if (top + size > window.innerHeight)
        window.scrollBy(0, top + size - window.innerHeight + 8);
      draw();
    }

    return {
      node,
      show,
      draw,
      move,
      open: () => choose(selected),
      get items() {
        return items;
      },
      get selected() {
        return selected;
      },
    };
  }

  return list;
})();
