"""What the page says of itself: whether JupyterLab is dark."""

from __future__ import annotations

import anywidget
import traitlets


class PageTheme(anywidget.AnyWidget):
    """Follows JupyterLab's theme; where a page is not JupyterLab's, `dark` stays as it is. Shows nothing."""

    dark = traitlets.Bool(False).tag(sync=True)
    _esm = """
    export default { render({ model }) {
      const read = () => {
        const light = document.body.dataset.jpThemeLight;
        if (light === undefined) return;
        model.set("dark", light === "false");
        model.save_changes();
      };
      read();
      const seen = new MutationObserver(read);
      seen.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
      return () => seen.disconnect();
    } };
    """
