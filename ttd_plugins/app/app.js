// The choice of a map, the opacity of all maps, and what moves on the page. Results come later, so the document listens.
(() => {
  const PHONE = 760;
  let map = "caption", caption = "", goToResult = false;

  function choose(result, key) {
    map = key;
    result.querySelectorAll("img.ttd-heat").forEach((heat) => { heat.hidden = heat.dataset.map !== key; });
    result.querySelectorAll("button[data-map]").forEach((button) => {
      button.setAttribute("aria-pressed", String(button.dataset.map === key));
    });
  }

  function press(thumbnail) {
    const gallery = thumbnail.closest(".ttd-gallery");
    gallery.querySelectorAll(".ttd-thumb").forEach((other) => {
      other.setAttribute("aria-pressed", String(other === thumbnail));
    });
  }

  function release(element) {
    element.closest("[role=tabpanel]")?.querySelectorAll(".ttd-thumb").forEach((thumbnail) => {
      thumbnail.setAttribute("aria-pressed", "false");
    });
  }

  // Gradio patches the old result into the new one: the chosen map stays chosen while the caption is the same.
  function settle(result) {
    const heading = result.querySelector(".ttd-caption");
    if (heading) {
      const known = heading.textContent === caption && result.querySelector(`button[data-map="${map}"]`);
      caption = heading.textContent;
      choose(result, known ? map : "caption");
    }
    if (!result.checkVisibility()) return;
    const text = result.dataset.stage || "The result is complete.";
    document.querySelectorAll("#ttd-live").forEach((live) => { if (live.textContent !== text) live.textContent = text; });
    if (goToResult && window.innerWidth <= PHONE) result.closest(".column").scrollIntoView({ behavior: "smooth" });
    goToResult = false;
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const result = button.closest(".ttd-result");
    if (result && button.dataset.map) choose(result, button.dataset.map);
    if (button.matches(".ttd-thumb")) press(button);
    if (button.matches("#ttd-run, #ttd-segment-run")) goToResult = true;
    if (button.closest("#ttd-image, #ttd-segment-image")) release(button);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.closest("#ttd-caption, #ttd-segment-names")) goToResult = true;
  });
  document.addEventListener("input", (event) => {
    const slider = event.target.closest("#ttd-opacity input");
    if (!slider) return;
    document.documentElement.style.setProperty("--ttd-heat", slider.value / 100);
    slider.parentElement.querySelector("output").textContent = `${slider.value} %`;
  });
  for (const kind of ["change", "drop", "paste"]) {
    document.addEventListener(kind, (event) => {
      if (event.target.closest?.("#ttd-image, #ttd-segment-image")) release(event.target);
    }, true);
  }
  const observer = new MutationObserver(() => {
    document.querySelectorAll(".ttd-result").forEach(settle);
    document.querySelectorAll(".ttd-gallery").forEach((gallery) => {
      const first = gallery.querySelector(".ttd-thumb");
      if (first && !first.hasAttribute("aria-pressed")) press(first);
    });
    observer.takeRecords();
  });
  observer.observe(document, {
    childList: true, subtree: true, attributes: true, attributeFilter: ["data-stage", "hidden", "aria-pressed"],
  });
})();
