"use strict";
/* Draws the charts that the page carries as data. Text of legends is set as text, never as markup. */
(function () {
  var page = JSON.parse(document.getElementById("data").textContent);
  // Okabe and Ito's colours (without yellow, too faint on white); each with its own dash and marker.
  var STYLES = [
    { color: "#0072B2", fill: "rgba(0,114,178,.2)", dash: "solid", symbol: "circle" },
    { color: "#D55E00", fill: "rgba(213,94,0,.2)", dash: "dash", symbol: "square" },
    { color: "#009E73", fill: "rgba(0,158,115,.2)", dash: "dot", symbol: "diamond" },
    { color: "#CC79A7", fill: "rgba(204,121,167,.25)", dash: "dashdot", symbol: "triangle-up" },
    { color: "#E69F00", fill: "rgba(230,159,0,.25)", dash: "longdash", symbol: "cross" },
    { color: "#56B4E9", fill: "rgba(86,180,233,.25)", dash: "longdashdot", symbol: "triangle-down" },
    { color: "#222222", fill: "rgba(0,0,0,.15)", dash: "solid", symbol: "x" },
  ];
  var SHAPES = {
    circle: "M5 9a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", square: "M5 5h8v8h-8z", diamond: "M9 4l5 5l-5 5l-5 -5z",
    "triangle-up": "M9 4l5 9h-10z", "triangle-down": "M9 14l5 -9h-10z", cross: "M7.5 5h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z",
    star: "M9 3l1.8 4h4.2l-3.4 2.8l1.3 4.2l-3.9 -2.5l-3.9 2.5l1.3 -4.2l-3.4 -2.8h4.2z",
    x: "M5 6l1 -1l3 3l3 -3l1 1l-3 3l3 3l-1 1l-3 -3l-3 3l-1 -1l3 -3z",
  };
  var DASHES = { solid: "", dash: "6 4", dot: "2 3", dashdot: "7 3 2 3", longdash: "10 4", longdashdot: "10 3 2 3" };
  var FONT = { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: 13, color: "#222" };
  var LABEL = { align: "left", bgcolor: "#fff", bordercolor: "#555", font: { color: "#111", size: 13 } };
  var PRINT_WIDTH = 640; // the text width of A4 and letter pages, with their margins

  // From light to dark, so that the order survives a grey print.
  function shade(part) {
    var from = [150, 200, 230], to = [8, 36, 90];
    return "rgb(" + from.map(function (v, i) { return Math.round(v + (to[i] - v) * part); }).join(",") + ")";
  }

  function style(series) {
    if (series.drawn) return series.drawn;
    if (typeof series.shade === "number") return { color: shade(series.shade), fill: "rgba(0,0,0,0)", dash: "solid", symbol: "circle" };
    var base = STYLES[series.style % STYLES.length];
    // An eighth profile takes up the first colour again, with the next one's dash and marker.
    var next = STYLES[(series.style + Math.floor(series.style / STYLES.length)) % STYLES.length];
    return { color: base.color, fill: base.fill, dash: next.dash, symbol: next.symbol + (series.fresh ? "-open" : "") };
  }

  // A closed outline for each stroke of a curve: along the upper ends and back along the lower ones.
  function band(series) {
    var x = [], y = [], from = 0;
    for (var i = 0; i <= series.x.length; i++) {
      if (i < series.x.length && series.x[i] !== null) continue;
      var part = series.x.slice(from, i);
      x.push.apply(x, part.concat(part.slice().reverse(), [null]));
      y.push.apply(y, series.high.slice(from, i).concat(series.low.slice(from, i).reverse(), [null]));
      from = i + 1;
    }
    return { x: x, y: y };
  }

  function traces(chart, hidden) {
    var drawn = [];
    if (chart.heat) return [{
      type: "heatmap", z: chart.heat, zmin: chart.range[0], zmax: chart.range[1], x: chart.names, y: chart.names, customdata: chart.hover, hovertemplate: "%{customdata}<extra></extra>",
      hoverongaps: false, colorscale: [[0, "#08306b"], [0.5, "#6baed6"], [1, "#f7fbff"]], xgap: 1, ygap: 1,
      colorbar: { tickformat: "~%", thickness: 12, outlinewidth: 1 },
    }];
    chart.series.forEach(function (series, number) {
      var s = style(series), visible = !hidden[number];
      var points = series.x.length, bars = series.low && series.low.length, alone = series.mode === "markers" || points === 1;
      if (bars && !alone) {
        var area = band(series);
        if (chart.y.log) area.y = area.y.map(function (v) { return v === null ? null : Math.max(v, heights(chart)[0] / 1e3); });
        drawn.push({
          type: "scatter", mode: "lines", x: area.x, y: area.y, fill: "toself", fillcolor: s.fill,
          line: { width: 0 }, hoverinfo: "skip", showlegend: false, visible: visible,
        });
      }
      drawn.push({
        type: "scatter", mode: series.mode || "lines+markers", x: series.x, y: series.y, connectgaps: false,
        customdata: series.hover, hovertemplate: "%{customdata}<extra></extra>", showlegend: false, visible: visible,
        hoverinfo: series.hover.length ? undefined : "skip",
        error_y: bars && alone ? {
          type: "data", symmetric: false, color: s.color, thickness: 1.5, width: 4,
          array: series.high.map(function (v, i) { return v - series.y[i]; }),
          arrayminus: series.low.map(function (v, i) { return series.y[i] - v; }),
        } : undefined,
        line: { color: s.color, dash: series.mode === "lines" ? "solid" : s.dash, width: 2 },
        marker: { color: s.color, symbol: s.symbol, size: series.mode === "markers" ? 12 : points > 60 ? 5 : 8, line: { width: 1.5, color: s.color } },
      });
    });
    return drawn;
  }

  // As many tick labels as fit: every block, or every 2nd, 5th, 10th ... of each section.
  function ticks(chart, width) {
    var all = chart.x.ticks, places = all.length ? all[all.length - 1][0] + 1 : 1, room = (width - 80) / places;
    var step = [1, 2, 5, 10, 20, 50, 100].filter(function (n) { return n * room >= 22; })[0] || 200;
    return all.filter(function (t) { return (t[1] === "in" && step === 1) || +t[1] % step === 0 || (t[1] === "1" && step > 2); });
  }

  function horizontal(chart, width) {
    var axis = { title: { text: chart.x.title, standoff: 8 }, zeroline: false, gridcolor: "#e4e4e4", automargin: true, fixedrange: coarse() };
    if (chart.x.kind === "plain") {
      axis.type = chart.x.log ? "log" : "linear";
      if (!chart.x.log && counts(chart) && extent(chart)[1] - extent(chart)[0] <= 12) axis.dtick = 1; // counts have no halves
      if (chart.x.log) {
        axis.tickvals = logTicks(extent(chart)); axis.ticktext = axis.tickvals.map(String);
        axis.range = [Math.log10(extent(chart)[0] / 1.6), Math.log10(extent(chart)[1] * 1.6)];
      }
      if (chart.x.ticks) {
        axis.tickvals = chart.x.ticks.map(function (t) { return t[0]; });
        axis.ticktext = chart.x.ticks.map(function (t) { return t[1]; });
        if (!chart.x.log) axis.range = chart.x.range;
      }
      return axis;
    }
    var bands = chart.x.bands;
    if (chart.x.kind === "whole") { axis.range = [-0.02, 1.02]; return axis; }
    axis.range = [bands[0][0], bands[bands.length - 1][1]];
    axis.showgrid = false;
    if (chart.x.kind === "blocks") {
      var shown = ticks(chart, width);
      axis.tickvals = shown.map(function (t) { return t[0]; });
      axis.ticktext = shown.map(function (t) { return t[1]; });
    } else {
      axis.tickvals = []; axis.ticktext = [];
      bands.forEach(function (b, s) {
        [0, 0.5, 1].forEach(function (part) {
          if (part === 1 && s < bands.length - 1) return;
          axis.tickvals.push(s + 0.04 + 0.92 * part); axis.ticktext.push(part === 0 && s ? "1|0" : String(part));
        });
      });
      axis.tickvals = axis.tickvals.map(function (v, i) { return axis.ticktext[i] === "1|0" ? Math.round(v) : v; });
    }
    return axis;
  }

  // 1, 2, 5, 10, 20 ... as far as the points go.
  function logTicks(ends) {
    var low = ends[0], high = ends[1], found = [];
    for (var e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      [1, 2, 5].forEach(function (m) { var v = +(m * Math.pow(10, e)).toPrecision(3); if (v >= low / 2.6 && v <= high * 2.6) found.push(v); });
    return found.length > 9 ? found.filter(function (v) { return Math.abs(Math.log10(v) % 1) < 1e-9; }) : found;
  }

  // The smallest and the largest value above zero.
  function heights(chart) {
    var values = [];
    chart.series.forEach(function (s) { values = values.concat(s.y.filter(function (v) { return v !== null && v > 0; })); });
    return [Math.min.apply(null, values), Math.max.apply(null, values)];
  }

  function counts(chart) {
    return chart.series.every(function (s) { return s.x.every(function (v) { return v === null || v % 1 === 0; }); });
  }

  // The smallest and the largest position from left to right.
  function extent(chart) {
    var low = Infinity, high = -Infinity;
    chart.series.forEach(function (s) { s.x.forEach(function (v) { if (v !== null) { low = Math.min(low, v); high = Math.max(high, v); } }); });
    return [low, high];
  }

  function vertical(chart) {
    var axis = {
      zeroline: true, zerolinecolor: "#999", gridcolor: "#e4e4e4",
      automargin: true, fixedrange: coarse(), type: chart.y.log ? "log" : "linear",
    };
    if (chart.y.percent) axis.tickformat = "~%";
    if (chart.y.log) {
      // Fitted to the curves: the lower end of a band may be at or below zero, infinitely far down.
      axis.tickvals = logTicks(heights(chart));
      axis.range = [Math.log10(heights(chart)[0] / 2), Math.log10(heights(chart)[1] * 2)];
      if (!chart.y.percent) axis.ticktext = axis.tickvals.map(String);
    }
    if (chart.y.range) axis.range = chart.y.range;
    else if (!chart.y.log) axis.rangemode = "tozero";
    if (chart.y.ticks) {
      axis.tickvals = chart.y.ticks.map(function (t) { return t[0]; });
      axis.ticktext = chart.y.ticks.map(function (t) { return t[1]; });
      axis.zeroline = false;
    }
    return axis;
  }

  // As square as the page allows; names of blocks are text, not numbers.
  function table(chart, width) {
    var axis = { type: "category", automargin: true, showgrid: false, zeroline: false, fixedrange: true, nticks: width < 700 ? 8 : 24, constrain: "domain" };
    return {
      width: width, height: height(chart, width), margin: { l: 50, r: 10, t: 10, b: 44 }, paper_bgcolor: "#fff", plot_bgcolor: "#eee",
      font: FONT, hoverlabel: LABEL, dragmode: false,
      xaxis: Object.assign({ title: { text: chart.x.title, standoff: 8 } }, axis),
      yaxis: Object.assign({ title: { text: chart.y.title, standoff: 8 }, autorange: "reversed", scaleanchor: "x" }, axis),
    };
  }

  function height(chart, width) {
    if (chart.heat) return Math.min(width, 540);
    return chart.height || (width < 700 ? 290 : 350);
  }

  function layout(chart, width) {
    if (chart.heat) return table(chart, width);
    var shapes = [], notes = [], bands = chart.x.bands || [];
    if (bands.length > 1) bands.forEach(function (b, s) {
      if (s % 2 === 0) shapes.push({
        type: "rect", xref: "x", yref: "paper", x0: b[0], x1: b[1], y0: 0, y1: 1, layer: "below",
        fillcolor: "#f1f4f7", line: { width: 0 },
      });
      var room = ((width - 80) * (b[1] - b[0])) / (bands[bands.length - 1][1] - bands[0][0]);
      notes.push({
        text: b[2].length * 6.4 < room ? b[2] : String(s + 1), x: (b[0] + b[1]) / 2, y: 1, xref: "x", yref: "paper",
        yanchor: "bottom", showarrow: false, font: { size: 12, color: "#444" },
      });
    });
    return {
      width: width, height: height(chart, width),
      margin: { l: 44, r: 14, t: bands.length > 1 ? 26 : 12, b: 44 },
      paper_bgcolor: "#fff", plot_bgcolor: "#fff", showlegend: false, hovermode: "closest", dragmode: coarse() ? false : "zoom",
      font: FONT, hoverlabel: LABEL,
      xaxis: horizontal(chart, width), yaxis: vertical(chart), shapes: shapes, annotations: notes,
    };
  }

  // On touch screens a drag scrolls the page instead of zooming the chart.
  function coarse() { return window.matchMedia("(pointer: coarse)").matches; }

  function swatch(series) {
    var s = style(series), ns = "http://www.w3.org/2000/svg", svg = document.createElementNS(ns, "svg");
    svg.setAttribute("width", "44"); svg.setAttribute("height", "18"); svg.setAttribute("viewBox", "-13 0 44 18"); svg.setAttribute("aria-hidden", "true");
    function path(d, attributes) {
      var p = document.createElementNS(ns, "path");
      p.setAttribute("d", d);
      Object.keys(attributes).forEach(function (k) { p.setAttribute(k, attributes[k]); });
      svg.appendChild(p);
    }
    if (series.mode !== "markers") path("M-13 9h44", { stroke: s.color, "stroke-width": 2, "stroke-dasharray": DASHES[s.dash] });
    if (series.mode !== "lines") path(SHAPES[s.symbol.replace("-open", "")], { fill: series.fresh ? "#fff" : s.color, stroke: s.color, "stroke-width": 1.5 });
    return svg;
  }

  // One button per curve: shows what it looks like, and hides or shows it.
  function legend(place, chart, hidden, redraw) {
    var named = chart.series.filter(function (s) { return s.name; });
    if (named.length < 2) return;
    chart.series.forEach(function (series, number) {
      if (!series.name || series.quiet) return;
      var button = document.createElement("button"), text = document.createElement("span");
      text.textContent = series.name;
      button.type = "button"; button.title = "hide or show this curve";
      button.setAttribute("aria-pressed", String(!hidden[number]));
      button.appendChild(swatch(series)); button.appendChild(text);
      button.addEventListener("click", function () {
        hidden[number] = !hidden[number];
        button.setAttribute("aria-pressed", String(!hidden[number]));
        redraw();
      });
      place.appendChild(button);
    });
  }

  // A chart is drawn when it comes near the window, so that a page of many opens at once; until then its place is kept.
  var charts = page.charts.map(function (chart) {
    var figure = document.getElementById("chart-" + chart.id), plot = figure.querySelector(".plot");
    var hidden = chart.series.map(function (s) { return Boolean(s.hidden); }), drawn = 0;
    function draw(width) {
      drawn = width || figure.clientWidth || drawn;
      if (drawn) Plotly.react(plot, traces(chart, hidden), layout(chart, drawn), { displaylogo: false, displayModeBar: false, responsive: false });
    }
    // Above the chart instead of turned at its side: it may be long, and charts on phones are narrow.
    figure.querySelector(".axis").textContent = chart.heat ? "colour: " + chart.label : chart.y.title && "\u2191 " + chart.y.title;
    legend(figure.querySelector(".legend"), chart, hidden, function () { draw(drawn); });
    plot.style.minHeight = height(chart, figure.clientWidth || 600) + "px";
    return { figure: figure, draw: draw, seen: false };
  });
  function all(width) { charts.forEach(function (chart) { chart.seen = true; chart.draw(width); }); }
  var observer = new IntersectionObserver(function (entries) {
    entries.forEach(function (entry) {
      var chart = charts.filter(function (c) { return c.figure === entry.target; })[0];
      if (!entry.isIntersecting || chart.seen) return;
      chart.seen = true;
      chart.draw();
    });
  }, { rootMargin: "600px" });
  charts.forEach(function (chart) { observer.observe(chart.figure); });

  var waiting, closed = [];
  window.addEventListener("resize", function () {
    clearTimeout(waiting);
    waiting = setTimeout(function () { charts.forEach(function (chart) { if (chart.seen) chart.draw(); }); }, 150);
  });
  window.addEventListener("beforeprint", function () {
    closed = Array.prototype.filter.call(document.querySelectorAll("details"), function (d) { return !d.open; });
    closed.forEach(function (d) { d.open = true; });
    all(PRINT_WIDTH);
  });
  window.addEventListener("afterprint", function () {
    closed.forEach(function (d) { d.open = false; });
    charts.forEach(function (chart) { chart.draw(); });
  });
})();
