"use strict";
const root = document.documentElement;
root.classList.add("js");
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// Headings sort: best first, then worst first, then in the original order.
for (const table of all("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = all("thead th", table);
  const value = (row, column, kind) => {
    const stored = row.cells[column].dataset.sort;
    return kind === "text" ? stored : stored === "" ? null : Number(stored);
  };
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const first = head.dataset.first;
      const second = first === "ascending" ? "descending" : "ascending";
      const now = head.getAttribute("aria-sort");
      const next = now === "none" ? first : now === first ? second : "none";
      heads.forEach((other) => other.setAttribute("aria-sort", other === head ? next : "none"));
      table.classList.toggle("sorted", next !== "none");
      const rows = [...original];
      if (next !== "none") {
        const sign = next === "ascending" ? 1 : -1;
        rows.sort((one, two) => {
          const a = value(one, column, head.dataset.kind);
          const b = value(two, column, head.dataset.kind);
          // Unknown values come last in both directions.
          if (a === null || b === null) return (a === null) - (b === null);
          return sign * (head.dataset.kind === "text" ? a.localeCompare(b) : a - b);
        });
      }
      body.append(...rows);
      document.getElementById("sorted").textContent =
        next === "none" ? "In the original order" : `Sorted by ${head.dataset.label}, ${next}`;
    });
  });
}

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
