// Search boxes for the cards of losses and the table of models. Without this script, everything is shown.
const SIZE = /^v?\d+(\.\d+)*[bmk]?$/; // a version, or a number of parameters
const KIND = /^(a\d+b|base|chat|instruct|it|hf|preview|gguf|awq|gptq|fp8|bf16|4bit|int4)$/;

// What a query may mean, the strictest first: lists of words that all have to be there. People name a model as its
// checkpoint is called, Llama-3.1-8B-Instruct, and a table has one line for them all.
function readings(query) {
  const typed = query.split(/\s+/).filter(Boolean);
  if (!/[\d/-]/.test(query)) return [typed]; // not the name of a checkpoint
  const parts = query.split(/[\s_/:-]+/).filter(Boolean);
  const model = query.split("/").at(-1).split(/[\s_:-]+/).filter((part) => part && !KIND.test(part));
  const names = model.filter((part) => !SIZE.test(part));
  const first = (names[0] ?? "").replace(/[\d.]+$/, "");
  return [
    typed,
    query.includes(".") ? [query.replaceAll(".", "_")] : [],
    parts,
    model,
    model.length > 1 ? [model.slice(0, 2).join(" ")] : [],
    model.length > 1 ? [model.slice(0, 2).join("-")] : [],
    names,
    names.slice(0, 1),
    [first],
  ].filter((words) => words.length && (words === typed || words.join("").length > 2));
}

// The first reading of which anything has all words, and which items these are.
function matching(query, texts) {
  const asked = readings(query.toLowerCase().trim());
  for (const words of asked) {
    const hits = texts.map((text) => words.every((word) => text.includes(word)));
    if (hits.includes(true)) return { words, hits, typed: words === asked[0] };
  }
  return { words: [], hits: texts.map(() => false), typed: true };
}

function filterable(box) {
  const items = [...box.querySelectorAll(".item, tbody tr")];
  const texts = items.map((item) => item.textContent.toLowerCase());
  const kinds = [...new Set(items.flatMap((item) => (item.dataset.kinds ?? "").split(" ").filter(Boolean)))];
  const names = { free: "no reference", scores: "given rewards", sum: "sums", batch: "across the batch" };
  const chosen = new Set();

  const bar = document.createElement("div");
  bar.className = "filter";
  const input = Object.assign(document.createElement("input"), { type: "search", placeholder: box.dataset.filter });
  input.setAttribute("aria-label", box.dataset.filter);
  const count = document.createElement("output");
  const said = document.createElement("p");
  said.setAttribute("role", "status");
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
  bar.append(input, ...buttons, count, said);
  box.prepend(bar);

  function apply() {
    const { words, hits, typed } = matching(input.value, texts);
    let shown = 0;
    items.forEach((item, i) => {
      const of_kind = (item.dataset.kinds ?? "").split(" ");
      item.hidden = !(hits[i] && [...chosen].every((kind) => of_kind.includes(kind)));
      shown += !item.hidden;
    });
    for (const group of box.querySelectorAll(".group, table")) {
      group.hidden = !group.querySelector(".item:not([hidden]), tbody tr:not([hidden])");
    }
    count.textContent = shown === items.length ? `${shown}` : `${shown} of ${items.length}`;
    const asked = input.value.trim();
    said.textContent = !shown ? box.dataset.none : typed ? "" : `Nothing has "${asked}"; this is what has "${words.join(" ")}".`;
    said.hidden = !said.textContent;
  }
  input.addEventListener("input", apply);
  // On the way back a browser fills the field again, and tells nobody.
  window.addEventListener("pageshow", apply);
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

document.querySelectorAll(".filterable").forEach(filterable);
