"use strict";
const root = document.documentElement;
const opacity = document.getElementById("opacity");
if (opacity) {
  const shown = document.getElementById("opacity-value");
  const outline = document.getElementById("outline");
  const button = document.getElementById("all-tags");
  const setOpacity = () => {
    root.style.setProperty("--heat", opacity.value / 100);
    shown.textContent = opacity.value + " %";
  };
  const setOutline = () => root.classList.toggle("no-outline", !outline.checked);
  opacity.addEventListener("input", setOpacity);
  outline.addEventListener("change", setOutline);
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", open);
    document.querySelectorAll("#gallery details").forEach((details) => { details.open = open; });
  });
  // A reloaded page keeps what its controls were set to.
  setOpacity();
  setOutline();
}
