"use strict";
// Dark or light: what was chosen, else what the system prefers. Runs before anything is drawn.

const theme = (() => {
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");

  function remembered() {
    try {
      return window.localStorage.getItem("mathv2-theme");
    } catch {
      return null; // a browser that keeps nothing for files
    }
  }

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  }

  function toggle() {
    const wanted = isDark() ? "light" : "dark";
    const asSystem = (wanted === "dark") === system.matches;
    if (asSystem) delete root.dataset.theme;
    else root.dataset.theme = wanted;
    try {
      if (asSystem) window.localStorage.removeItem("mathv2-theme");
      else window.localStorage.setItem("mathv2-theme", wanted);
    } catch {
      // it holds until the page is closed
    }
  }

  const chosen = remembered();
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  return { toggle };
})();
