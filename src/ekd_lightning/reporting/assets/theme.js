// Runs before anything is painted: the reader's choice, or that of the system.
(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = localStorage.getItem("ekd-theme");
  } catch {
    /* no storage for this file: the system decides */
  }
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
  };
  show(chosen === "dark" || chosen === "light" ? chosen : system.matches ? "dark" : "light");
  system.addEventListener("change", (event) => {
    if (chosen) return;
    show(event.matches ? "dark" : "light");
    dispatchEvent(new Event("themechange"));
  });
  window.setTheme = (theme, keep = true) => {
    show(theme);
    if (keep) {
      chosen = theme;
      try {
        localStorage.setItem("ekd-theme", theme);
      } catch {
        /* it holds until the page is closed */
      }
    }
    dispatchEvent(new Event("themechange"));
  };
})();
