"use strict";
// Which view the address asks for, the keys, and the way back.

report.page = (() => {
  const { views, store } = report;
  const { make } = report.dom;
  const TYPING_PAUSE = 120; // milliseconds
  const main = document.getElementById("main");
  const search = document.getElementById("search");
  const keys = document.getElementById("keys");
  const places = new Map(); // by address: how far a list was scrolled and which row was selected
  let now = { node: main };
  let address = "";
  let series = []; // the cases of the list from which a proof was opened
  let depth = 0; // addresses of this page behind the present one; history keeps it
  let isReplacing = false;
  let turn = 0;

  function asked() {
    const [path, query = ""] = window.location.hash.replace(/^#\/?/, "").split("?");
    const at = path.indexOf("/");
    const [name, id] = at < 0 ? [path, ""] : [path.slice(0, at), path.slice(at + 1)];
    return { name, id: decoded(id), query: new URLSearchParams(query) };
  }

  function decoded(id) {
    try {
      return decodeURIComponent(id);
    } catch {
      return id;
    }
  }

  function made({ name, id, query }) {
    switch (name) {
      case "":
        return report.overview.overview();
      case "curves":
        return report.overview.curves(query);
      case "problems":
        return views.problems(query);
      case "problem":
        return views.problem(id);
      case "proofs":
        return views.proofs(query);
      case "proof":
        return views.proof(id);
      default:
        return views.missing("There is no such view.");
    }
  }

  async function show() {
    const own = (turn += 1);
    remember();
    const wanted = asked();
    let view;
    try {
      view = await made(wanted);
    } catch (error) {
      view = { ...views.missing(error.message), title: "Error" };
    }
    if (own !== turn) return; // another was asked for meanwhile
    now.leave?.();
    now = view;
    address = window.location.hash;
    main.replaceChildren(view.node);
    document.title = `${view.title} · ${store.index.name}`;
    if (document.activeElement !== search) search.value = wanted.query.get("q") ?? "";
    markView(wanted.name);
    view.ready?.();
    restore();
    if (document.activeElement !== search) (view.list?.node ?? main).focus({ preventScroll: true });
  }

  function remember() {
    if (now.list) places.set(address, { top: window.scrollY, selected: now.list.selected });
  }

  function restore() {
    const place = places.get(address);
    if (place && now.list) now.list.show(now.list.items, place.selected);
    window.scrollTo(0, place?.top ?? 0);
    now.list?.draw();
  }

  function markView(name) {
    const of = {
      "": "#/",
      curves: "#/curves",
      problems: "#/problems",
      problem: "#/problems",
      proofs: "#/proofs",
      proof: "#/proofs",
    };
    for (const link of document.querySelectorAll("#views a")) {
      if (link.getAttribute("href") === of[name]) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }

  function go(to) {
    window.location.hash = to;
  }

  function replace(to) {
    isReplacing = to !== window.location.hash;
    window.location.replace(to);
  }

  // Opens a case from a list, through which n and p then go.
  function read(at, all) {
    series = all;
    go(report.dom.address("proof", store.index.cases.id[at]));
  }

  function neighbour(by) {
    if (now.at === undefined) return;
    const all = series.includes(now.at) ? series : store.casesOf(store.index.cases.problem[now.at]);
    const next = all[all.indexOf(now.at) + by];
    if (next !== undefined) replace(report.dom.address("proof", store.index.cases.id[next]));
  }

  function back() {
    if (depth > 0) window.history.back();
    else if (now.up) replace(now.up);
  }

  const KEYS = new Map([
    ["j", () => (now.list ?? now).move?.(1)],
    ["k", () => (now.list ?? now).move?.(-1)],
    ["n", () => neighbour(1)],
    ["p", () => neighbour(-1)],
    ["d", () => now.turn?.()],
    ["t", () => theme.toggle()],
    ["/", () => search.select()],
    ["?", () => keys.showModal()],
    ["Escape", back],
  ]);

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || keys.open) return;
    if (event.target === search) typed(event);
    else if (!event.target.matches("select, input")) acted(event);
  }

  function acted(event) {
    const act = event.key === "Enter" ? opening(event.target) : KEYS.get(named(event));
    if (act === undefined) return;
    event.preventDefault();
    act();
  }

  // Enter opens a list's row, unless it is for the button or link that has the focus.
  function opening(target) {
    const own = [now.list?.node, document.body, main].includes(target);
    return now.list && own ? now.list.open : undefined;
  }

  // Arrows are j and k in a list and among analyses; elsewhere they scroll.
  function named({ key, target }) {
    const moves = now.list || target.matches("summary");
    return (moves && { ArrowDown: "j", ArrowUp: "k" }[key]) || key;
  }

  function typed(event) {
    if (event.key === "Escape") {
      event.preventDefault();
      search.blur();
      (now.list?.node ?? main).focus({ preventScroll: true });
    } else if (event.key === "Enter" || event.key === "ArrowDown") {
      event.preventDefault();
      find();
      now.list?.node.focus({ preventScroll: true });
    }
  }

  let pause = 0;

  function find() {
    window.clearTimeout(pause);
    const { name, query } = asked();
    const listed = name === "problems" || name === "proofs";
    if (listed) query.set("q", search.value);
    const to = report.dom.address(
      listed ? name : "proofs",
      null,
      listed ? Object.fromEntries(query) : { q: search.value },
    );
    if (to === window.location.hash) return;
    if (listed) replace(to);
    else go(to);
  }

  window.addEventListener("hashchange", () => {
    depth = window.history.state?.depth ?? depth + (isReplacing ? 0 : 1);
    isReplacing = false;
    window.history.replaceState({ depth }, "");
    show();
  });
  window.addEventListener("scroll", () => now.list?.draw(), { passive: true });
  window.addEventListener("resize", () => now.list?.draw());
  document.addEventListener("keydown", pressed);
  search.addEventListener("input", () => {
    window.clearTimeout(pause);
    pause = window.setTimeout(find, TYPING_PAUSE);
  });
  document.getElementById("theme").addEventListener("click", () => theme.toggle());
  document.getElementById("help").addEventListener("click", () => keys.showModal());
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
  window.addEventListener("beforeprint", () => {
    for (const details of main.querySelectorAll(".main > section > details")) details.open = true;
  });

  function start() {
    if (store.index === null) {
      main.replaceChildren(
        make(
          "p",
          {},
          "data/index.js could not be read: write the report again with mathv2-report.",
        ),
      );
      return;
    }
    depth = window.history.state?.depth ?? 0;
    show();
  }

  start();
  return { go, replace, read };
})();
