// Search boxes for the cards of losses and the table of models. Without this script, everything is shown.
for (const box of document.querySelectorAll(".filterable")) {
  const items = [...box.querySelectorAll(".item, tbody tr")];
  const kinds = [...new Set(items.flatMap((item) => (item.dataset.kinds ?? "").split(" ").filter(Boolean)))];
  const names = { free: "no reference", scores: "given rewards", sum: "sums", batch: "across the batch" };
  const chosen = new Set();

  const bar = document.createElement("div");
  bar.className = "filter";
  const input = Object.assign(document.createElement("input"), { type: "search", placeholder: box.dataset.filter });
  input.setAttribute("aria-label", box.dataset.filter);
  const count = document.createElement("output");
  const buttons = kinds.map((kind) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: names[kind] ?? kind });
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      if (!chosen.delete(kind)) chosen.add(kind);
      button.setAttribute("aria-pressed", String(chosen.has(kind)));
      apply();
    });
    return button;
  });
  bar.append(input, ...buttons, count);
  box.prepend(bar);

  function apply() {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const item of items) {
      const text = item.textContent.toLowerCase();
      const of_kind = (item.dataset.kinds ?? "").split(" ");
      item.hidden = !(words.every((word) => text.includes(word)) && [...chosen].every((kind) => of_kind.includes(kind)));
      shown += !item.hidden;
    }
    for (const group of box.querySelectorAll(".group")) group.hidden = !group.querySelector(".item:not([hidden])");
    count.textContent = shown === items.length ? `${shown}` : `${shown} of ${items.length}`;
  }
  input.addEventListener("input", apply);
  // A link to a loss shows it, whatever the filter hid.
  window.addEventListener("hashchange", () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target?.closest(".item[hidden]")) {
      input.value = "";
      chosen.clear();
      buttons.forEach((button) => button.setAttribute("aria-pressed", "false"));
      apply();
      target.scrollIntoView();
    }
  });
  apply();
}
