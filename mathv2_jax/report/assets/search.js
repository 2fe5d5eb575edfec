"use strict";
// A search among the cases of a list, shown as it goes on.

report.search = (() => {
  const { store, filters } = report;
  const { number, counted } = report.dom;
  const SEARCH_IN_TEXTS_AFTER = 350; // milliseconds without a key

  // Ids and statements at once, then the texts of proofs, chunk by chunk.
  function searching(asked, shown, status) {
    let search = 0;
    let waiting = 0;

    function say(found, words, progress = "") {
      const all =
        found.length === store.numCases
          ? counted(found.length, "proof")
          : `${number(found.length)} of ${counted(store.numCases, "proof")}`;
      status.textContent = words && progress ? `${all} · ${progress}` : all;
    }

    function find(words) {
      search += 1;
      window.clearTimeout(waiting);
      asked.q = words;
      const also = new Set();
      const found = filters.cases(asked, also);
      shown.show(found);
      say(found, words, "searching the texts …");
      if (words.trim())
        waiting = window.setTimeout(() => inTexts(words, also, search), SEARCH_IN_TEXTS_AFTER);
    }

    async function inTexts(words, also, own) {
      const isOver = () => own !== search;
      try {
        await filters.texts(words, isOver, (numbers, done, all) => {
          const before = also.size;
          numbers.forEach((at) => also.add(at));
          const over = done === all;
          if (also.size > before || over) {
            const found = filters.cases(asked, also);
            if (found.length !== shown.items.length) shown.show(found, shown.selected);
            say(
              found,
              words,
              over ? "" : `${Math.round((100 * done) / all)} % of the texts searched`,
            );
          }
        });
      } catch (error) {
        if (!isOver()) status.textContent = error.message;
      }
    }

    const leave = () => {
      search += 1;
      window.clearTimeout(waiting);
    };
    return { find, leave };
  }

  return searching;
})();
