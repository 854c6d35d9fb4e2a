// Runs before the first paint, so that a chosen theme never flashes the other one.
// A classic script: a module would wait until the document is read.
(function () {
  try {
    const kept = JSON.parse(localStorage.getItem("ziphius.settings") || "{}");
    if (kept.theme === "light" || kept.theme === "dark") {
      document.documentElement.dataset.theme = kept.theme;
    }
  } catch {
    // Storage is off or damaged: the system's theme holds.
  }
})();
