"use strict";
// Dark or light: what was chosen, else what the system prefers. Runs before anything is drawn.

const theme = (() => {
  const KEY = "mathv2-theme";
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = kept((storage) => storage.getItem(KEY));

  // What `use` makes of the browser's storage; null where it keeps nothing for files.
  function kept(use) {
    try {
      return use(window.localStorage);
    } catch {
      return null;
    }
  }

  const preferred = () => (system.matches ? "dark" : "light");

  function show() {
    root.dataset.theme = chosen === "dark" || chosen === "light" ? chosen : preferred();
  }

  // What the system prefers too is followed from then on.
  function toggle() {
    const wanted = root.dataset.theme === "dark" ? "light" : "dark";
    chosen = wanted === preferred() ? null : wanted;
    kept((storage) => (chosen ? storage.setItem(KEY, chosen) : storage.removeItem(KEY)));
    show();
  }

  system.addEventListener("change", show);
  show();
  return { toggle };
})();
