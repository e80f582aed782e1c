"use strict";
(() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const config = { responsive: true, displayModeBar: false };
  const drawn = new Map(); // element -> figure

  const variable = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const isDark = () => root.dataset.theme === "dark";
  const colour = (role) => data.colours[role][isDark() ? "dark" : "light"];

  function coloured(trace) {
    const meta = trace.meta || {};
    const found = { ...trace };
    if (meta.roles) {
      found.marker = { ...trace.marker, color: meta.roles.map(colour) };
    } else if (meta.role) {
      found.marker = { ...trace.marker, color: colour(meta.role) };
      if (trace.line) found.line = { ...trace.line, color: colour(meta.role) };
      if (trace.error_x) found.error_x = { ...trace.error_x, color: variable("--text") };
    }
    return found;
  }

  function themed(layout, width) {
    const line = variable("--line");
    const around = { gridcolor: line, linecolor: line, zerolinecolor: line };
    const found = {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: variable("--text"), size: width < 500 ? 11 : 13 },
      margin: { l: 10, r: 10, t: 10, b: 10, ...layout.margin },
      hoverlabel: { align: "left" },
      legend: { orientation: "h", yanchor: "bottom", y: 1.01, x: 0, ...layout.legend },
    };
    for (const name of ["xaxis", "yaxis"]) found[name] = { ...around, ...layout[name] };
    return found;
  }

  function draw(element, figure) {
    drawn.set(element, figure);
    if (!element.offsetParent) return null; // in a panel that is not shown
    const layout = themed(figure.layout, element.clientWidth);
    return Plotly.react(element, figure.data.map(coloured), layout, config);
  }

  const redraw = () => drawn.forEach((figure, element) => draw(element, figure));

  function show(layer, head) {
    const heads = data.heads;
    document.getElementById("head").hidden = false;
    document.getElementById("head-text").innerHTML = heads.text[layer][head];
    const own = heads.chosen ? heads.chosen[layer][head] : {};
    const roles = ["plan", "other-1"];
    const traces = heads.curves.map((curve, index) => {
      const x = [], y = [];
      curve.harm[layer][head].forEach((harm, place) => {
        if (harm > 0) { x.push(curve.kept[layer][place]); y.push(harm); }
      });
      return {
        type: "scatter", mode: "markers", name: curve.name, x, y, opacity: 0.8, meta: { role: roles[index] },
        marker: { symbol: index ? "diamond" : "circle", size: 7 }, hovertemplate: "%{x:,} tokens: %{y:.3g} nats",
      };
    });
    if (own.harm > 0) {
      traces.push({
        type: "scatter", mode: "markers", name: "its rule, formats included", x: [own.kept], y: [own.harm],
        meta: { role: "uniform" }, marker: { symbol: "star", size: 15 }, hovertemplate: "%{x:,} tokens: %{y:.3g} nats",
      });
    }
    const curve = document.getElementById("figure-curve");
    const distance = document.getElementById("figure-distance");
    curve.hidden = !traces.length;
    distance.hidden = !heads.distance; // before the other is drawn, which takes the room
    if (traces.length) {
      draw(document.getElementById("curve"), {
        data: traces,
        layout: {
          height: 300, showlegend: true,
          xaxis: { title: { text: `tokens kept at ${heads.at}` }, automargin: true, rangemode: "tozero" },
          yaxis: { title: { text: "predicted harm, nats" }, type: "log", automargin: true, exponentformat: "none", dtick: 1 },
        },
      });
    }
    if (heads.distance) {
      const [first] = heads.sinks.share[layer][head];
      document.getElementById("distance-note").textContent =
        `Bars add up to all of its attention; ${(100 * first).toFixed(0)}% of it goes to the first ${heads.sinks.tokens[0]} tokens, at whatever distance.`;
      draw(document.getElementById("distance"), {
        data: [{
          type: "bar", x: heads.distance.labels, y: heads.distance.share[layer][head], meta: { role: "plan" },
          marker: {}, hovertemplate: "%{x} tokens back: %{y:.1%}<extra></extra>",
        }],
        layout: {
          height: 300, showlegend: false,
          xaxis: { title: { text: "tokens back" }, type: "category", automargin: true },
          yaxis: { title: { text: "share of its attention" }, automargin: true, tickformat: ".0%" },
        },
      });
    }
  }

  function theme(name) {
    root.dataset.theme = name;
    redraw();
  }

  for (const element of document.querySelectorAll(".plot[data-figure]")) {
    drawn.set(element, data.figures[element.dataset.figure]);
  }
  theme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", (event) => theme(event.matches ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click", () => theme(isDark() ? "light" : "dark"));

  const map = document.querySelector('[data-figure="heads"]');
  const shade = document.getElementById("shade");
  data.shades.forEach((entry, index) => shade.add(new Option(entry.name, index)));
  shade.addEventListener("change", () => {
    const entry = data.shades[shade.value];
    const trace = data.figures.heads.data[0];
    Object.assign(trace, { z: entry.z, zmax: entry.top });
    trace.colorbar = { ...trace.colorbar, title: { ...trace.colorbar.title, text: entry.unit } };
    draw(map, data.figures.heads);
  });
  map.on("plotly_click", (event) => show(event.points[0].x, event.points[0].y));

  for (const button of document.querySelectorAll("[data-tab]")) {
    button.addEventListener("click", () => {
      const tabs = button.closest(".tabs");
      for (const other of tabs.querySelectorAll("[data-tab]")) other.setAttribute("aria-selected", String(other === button));
      for (const panel of tabs.querySelectorAll("[data-panel]")) panel.hidden = panel.dataset.panel !== button.dataset.tab;
      redraw();
    });
  }

  let before = null;
  window.addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    for (const panel of document.querySelectorAll(".panel[hidden]")) { panel.hidden = false; panel.dataset.closed = ""; }
    theme("light");
  });
  window.addEventListener("afterprint", () => {
    for (const panel of document.querySelectorAll("[data-closed]")) { panel.hidden = true; delete panel.dataset.closed; }
    theme(before);
  });
  const [layer, head] = data.first;
  show(layer, head);
})();
