"use strict";
const root = document.documentElement;
root.classList.add("js");
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// Headings sort the backbones within each metric: best first, then worst first, then in the original order.
for (const table of all("table.sortable")) {
  const heads = all("thead th", table);
  const groups = [...table.tBodies].map((body) => ({ body, rows: all("tr.row", body) }));
  // Of a metric with a better direction the best comes first; of other metrics the largest, and of names A.
  const sign = (body, kind) => (kind === "text" || body.dataset.better === "lower" ? 1 : -1);
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const text = head.dataset.kind === "text";
      const states = text ? ["first", "last"] : ["best", "worst"];
      const now = states.indexOf(table.dataset.order === head.dataset.label ? table.dataset.state : "");
      const next = states[now + 1] ?? "none";
      table.dataset.order = head.dataset.label;
      table.dataset.state = next;
      heads.forEach((other) => other.setAttribute("aria-sort", other !== head || next === "none" ? "none"
        : text ? (next === "first" ? "ascending" : "descending") : "other"));
      heads.forEach((other) => { other.dataset.state = other === head ? next : "none"; });
      for (const { body, rows } of groups) {
        const sorted = [...rows];
        const turn = sign(body, head.dataset.kind) * (next === states[0] ? 1 : -1);
        const value = (row) => row.cells[column].dataset.sort;
        if (next !== "none") {
          sorted.sort((one, two) => {
            const a = value(one), b = value(two);
            // Unknown values come last in both directions.
            if (a === "" || b === "") return (a === "") - (b === "");
            return turn * (text ? a.localeCompare(b) : a - b);
          });
        }
        body.append(...sorted);
      }
      document.getElementById("sorted").textContent = next === "none" ? "In the original order"
        : text ? `Sorted by ${head.dataset.label}, ${next === "first" ? "A" : "Z"} first`
        : `Sorted by ${head.dataset.label} within each metric, ${next} first`;
    });
  });
}

// On paper nothing unfolds.
addEventListener("beforeprint", () => all("details:not([open])").forEach((one) => { one.open = one.dataset.unfolded = true; }));
addEventListener("afterprint", () => all("details[data-unfolded]").forEach((one) => { one.open = false; delete one.dataset.unfolded; }));

// One training curve at a time.
const curve = document.getElementById("curve");
if (curve) {
  const show = () => all(".part").forEach((part) => { part.hidden = part.dataset.part !== curve.value; });
  curve.addEventListener("change", show);
  show();
}

// The gallery: opacity, true regions, control, backbones, and the map of each image. A reloaded page keeps its settings.
const opacity = document.getElementById("opacity");
if (opacity) {
  const output = document.getElementById("opacity-value");
  const setOpacity = () => {
    root.style.setProperty("--heat", opacity.value / 100);
    output.textContent = `${opacity.value} %`;
  };
  opacity.addEventListener("input", setOpacity);
  setOpacity();
  for (const [id, act] of [
    ["outline", (on) => root.classList.toggle("no-outline", !on)],
    ["control", (on) => root.classList.toggle("control", on)],
  ]) {
    const box = document.getElementById(id);
    if (!box) continue;
    box.addEventListener("change", () => act(box.checked));
    act(box.checked);
  }
  const boxes = all("input.backbone");
  const choose = () => {
    const shown = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    all(".card[data-backbone]").forEach((card) => { card.hidden = !shown.has(card.dataset.backbone); });
    document.getElementById("shown").textContent = `${shown.size} of ${boxes.length}`;
  };
  boxes.forEach((box) => box.addEventListener("change", choose));
  if (boxes.length) choose();
  for (const article of all("#gallery article")) {
    const pick = () => {
      const map = article.querySelector(".maps input:checked").value;
      all("[data-map]", article).forEach((part) => { part.hidden = part.dataset.map !== map; });
      all("[data-tag]", article).forEach((row) => row.toggleAttribute("aria-current", row.dataset.tag === map));
      article.style.setProperty("--outline", `var(--outline-${map})`);
    };
    article.querySelector(".maps").addEventListener("change", pick);
    pick();
  }
}
