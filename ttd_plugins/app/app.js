// A click on a map's name shows this map for every backbone of the result. Results appear later, so the document listens.
document.addEventListener("click", (event) => {
  const button = event.target.closest(".ttd-result button[data-map]");
  if (!button) return;
  const result = button.closest(".ttd-result");
  const key = button.dataset.map;
  result.querySelectorAll("img.ttd-heat").forEach((heat) => { heat.hidden = heat.dataset.map !== key; });
  result.querySelectorAll("button[data-map]").forEach((other) => {
    other.setAttribute("aria-pressed", String(other.dataset.map === key));
  });
});
