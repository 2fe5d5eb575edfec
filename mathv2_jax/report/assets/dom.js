"use strict";
// Elements. Text becomes text nodes, here and everywhere: the page parses no HTML.

report.dom = (() => {
  const SVG = "http://www.w3.org/2000/svg";

  // make("a", { class: "quiet", href: "#/" }, "text", element, null)
  function make(tag, attributes = {}, ...children) {
    return filled(document.createElement(tag), attributes, children);
  }

  function draw(tag, attributes = {}, ...children) {
    return filled(document.createElementNS(SVG, tag), attributes, children);
  }

  function filled(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value === true ? "" : String(value));
    }
    return put(element, children);
  }

  // Children one by one: as arguments of one call, a long text's would be too many.
  function put(element, children) {
    for (const child of children.flat()) {
      if (child !== null && child !== undefined) element.append(child);
    }
    return element;
  }

  // The address of a view of this page; ids may hold anything.
  function address(view, id = null, query = {}) {
    const asked = new URLSearchParams(Object.entries(query).filter(([, value]) => value));
    const path = id === null ? view : `${view}/${encodeURIComponent(report.store.wellFormed(id))}`;
    return `#/${path}${asked.size ? `?${asked}` : ""}`;
  }

  function number(value, digits = 2) {
    if (value === null || value === undefined) return "–";
    if (Number.isInteger(value)) return value.toLocaleString("en");
    return String(Number(value.toFixed(digits)));
  }

  function counted(count, one, many = `${one}s`) {
    return `${number(count)} ${count === 1 ? one : many}`;
  }

  return { make, draw, put, address, number, counted };
})();
