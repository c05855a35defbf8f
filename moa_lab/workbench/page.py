"""The browser's side: plotly, loaded once for all figures, and whether JupyterLab's theme is dark."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import anywidget
import plotly
import plotly.graph_objects as go
import traitlets

from moa_lab.figures import CONFIG

BUNDLE = Path(plotly.__file__).parent / "package_data" / "widgetbundle.js"

_SHARED = """
const shared = globalThis.moaLabPlotly ??= (() => {
  let resolve;
  const loaded = new Promise((done) => { resolve = done; });
  return { loaded, resolve, asked: false };
})();
"""


class PageTheme(anywidget.AnyWidget):
    """Follows JupyterLab's theme; outside JupyterLab `dark` stays as it is. Invisible."""

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


class PageWidth(anywidget.AnyWidget):
    """width: pixels of the workbench around it (a box of class `moa-bench`), told when it has come to rest. Invisible."""

    width = traitlets.Int(0).tag(sync=True)
    _esm = """
    export default { render({ model, el }) {
      let waiting = 0, timer = 0;
      const tell = (width) => {
        if (!width || width === model.get("width")) return;
        model.set("width", width);
        model.save_changes();
      };
      const seen = new ResizeObserver(([entry]) => {
        const width = Math.round(entry.contentRect.width);
        clearTimeout(timer);
        // The first is told at once: figures are drawn for it.
        if (model.get("width")) timer = setTimeout(() => tell(width), 150);
        else tell(width);
      });
      const watch = () => {
        const bench = el.closest(".moa-bench");
        if (!bench) { waiting = requestAnimationFrame(watch); return; }
        seen.observe(bench);
      };
      watch();
      return () => { cancelAnimationFrame(waiting); clearTimeout(timer); seen.disconnect(); };
    } };
    """


class Keys(anywidget.AnyWidget):
    """Arrow keys and the space bar, pressed while a map of heads (a box of class `moa-keys`) has the focus, as messages {"key": name}.

    A click on a map gives it the focus. JupyterLab's own shortcuts are left out there: arrows would choose another cell. Invisible.
    """

    _esm = """
    export default { render({ model, el }) {
      const NAMES = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down", " ": "space" };
      const mapOf = (event) => {
        const map = event.target instanceof Element ? event.target.closest(".moa-keys") : null;
        return map && el.closest(".moa-bench")?.contains(map) ? map : null;
      };
      // Panels come and go with their run.
      const offer = () => {
        for (const map of el.closest(".moa-bench")?.querySelectorAll(".moa-keys:not([tabindex])") ?? []) {
          map.tabIndex = 0;
          map.setAttribute("role", "group");
          map.setAttribute("aria-label", "Map of heads: arrow keys move the selected head, space pins it");
          map.dataset.lmSuppressShortcuts = "true";
        }
      };
      let waiting = 0;
      const seen = new MutationObserver(() => { waiting ||= requestAnimationFrame(() => { waiting = 0; offer(); }); });
      const watch = () => {
        const bench = el.closest(".moa-bench");
        if (!bench) { waiting = requestAnimationFrame(watch); return; }
        waiting = 0;
        offer();
        seen.observe(bench, { childList: true, subtree: true });
      };
      watch();
      const pressed = (event) => { mapOf(event)?.focus({ preventScroll: true }); };
      const typed = (event) => {
        const name = NAMES[event.key];
        if (!name || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey || !mapOf(event)) return;
        event.preventDefault();
        event.stopPropagation();
        model.send({ key: name });
      };
      const heard = [["pointerdown", pressed], ["keydown", typed]];
      for (const [name, listener] of heard) document.addEventListener(name, listener, true);
      return () => {
        cancelAnimationFrame(waiting);
        seen.disconnect();
        for (const [name, listener] of heard) document.removeEventListener(name, listener, true);
      };
    } };
    """


class Pointed(anywidget.AnyWidget):
    """Which button of the chips beside it (a box of class `moa-chips`) the pointer or the focus is on, as messages {"over": its number},
    or None when it leaves. Invisible.
    """

    _esm = """
    export default { render({ model, el }) {
      let box = null, waiting = 0, at = null;
      const tell = (over) => {
        if (over === at) return;
        at = over;
        model.send({ over });
      };
      const over = (event) => {
        const chip = event.target instanceof Element ? event.target.closest(".moa-chip") : null;
        tell(chip ? [...box.querySelectorAll(".moa-chip")].indexOf(chip) : null);
      };
      const gone = () => tell(null);
      const heard = [["pointerover", over], ["focusin", over], ["pointerleave", gone], ["focusout", gone]];
      const find = () => {
        box = el.parentElement?.querySelector(".moa-chips") ?? null;
        if (!box) { waiting = requestAnimationFrame(find); return; }
        for (const [name, listener] of heard) box.addEventListener(name, listener);
      };
      find();
      return () => {
        cancelAnimationFrame(waiting);
        for (const [name, listener] of heard) box?.removeEventListener(name, listener);
      };
    } };
    """


class Bundle(anywidget.AnyWidget):
    """Sends plotly's five megabytes to a page once; plotly's own figure widget sends them with every figure.

    As bytes, which nobody on the way reads: text would be quoted, parsed and unquoted by the kernel, the server and the page.
    """

    source = traitlets.Bytes().tag(sync=True)
    _esm = (
        _SHARED
        + """
    export default { initialize({ model }) {
      if (shared.asked) return;
      shared.asked = true;
      const address = URL.createObjectURL(new Blob([model.get("source")], { type: "text/javascript" }));
      import(address).then((plotly) => shared.resolve(plotly.default));
    } };
    """
    )


class Figure(go.FigureWidget):
    """A figure widget that is ready on the page at once, with its content.

    anywidget drops messages to a widget that is not ready within two seconds. This one is ready before plotly is loaded: messages until
    then are kept, and handled when it is. A busy page may lose one while it draws for the first time; so it tells what it drew, and is
    sent what it lacks.
    """

    _esm = (
        _SHARED
        + """
    const SENT = ["addTraces", "deleteTraces", "moveTraces", "restyle", "relayout", "update", "animate",
                  "removeLayoutProps", "removeTraceProps"].map((name) => "_py2js_" + name);
    export default () => {
      let figure;
      return {
        initialize({ model }) {
          const missed = [];
          const keep = Object.fromEntries(SENT.map((name) => [name, () => missed.push([name, model.get(name)])]));
          for (const name of SENT) model.on("change:" + name, keep[name]);
          figure = shared.loaded.then((plotly) => {
            for (const name of SENT) model.off("change:" + name, keep[name]);
            const real = plotly();
            real.initialize({ model });
            for (const [name, sent] of missed) {
              if (sent === null) continue;
              model.set(name, null);
              model.set(name, sent);
            }
            return real;
          });
        },
        async render(view) {
          const told = ({ detail }) => {
            if (!view.el.contains(detail.element)) return;
            const { width = null, shapes = [] } = detail.element.layout;
            view.model.send({ drawn: { width, shapes: shapes.length } });
          };
          document.addEventListener("plotlywidget-after-render", told);
          const removed = await (await figure).render(view);
          return () => { document.removeEventListener("plotlywidget-after-render", told); removed?.(); };
        },
      };
    };
    """
    )

    def __init__(self, fig: go.Figure) -> None:
        _bundle()
        self._filled = False
        super().__init__(fig)
        self._config: dict[str, Any] = {**CONFIG}
        self._filled = True
        self.on_msg(lambda _, content, __: self._drawn(content["drawn"]) if "drawn" in content else None)
        self.open()

    def _drawn(self, page: dict[str, Any]) -> None:
        """Send the width and the shapes again where the page drew others."""
        layout = self.layout.to_plotly_json()
        shapes = layout.get("shapes", ())
        if (page["width"], page["shapes"]) != (layout.get("width"), len(shapes)):
            self._send_relayout_msg({"width": layout.get("width"), "shapes": list(shapes)})

    def open(self) -> None:
        """Open the connection to the page, once the figure has content."""
        if self._filled:
            super().open()


@cache
def _bundle() -> Bundle:
    return Bundle(source=BUNDLE.read_bytes())
