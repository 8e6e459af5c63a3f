// One choice of a map for every backbone of a result; the page adds results later, so clicks are heard at the top.
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
