// What the page does beyond links and forms; without it, it still works.

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const one = (selector) => document.querySelector(selector);

// Light or dark.
for (const button of all("[data-theme-toggle]")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try {
      localStorage.setItem("theme", root.dataset.theme);
    } catch {
      // it lasts as long as the page
    }
  });
}

// Copying.
for (const button of all("[data-copy]")) {
  const label = button.textContent;
  button.hidden = !navigator.clipboard; // which browsers give to https and loopback alone
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 1500);
  });
}

// The gallery shows what goes by search, family and verdict; the address says so too.
const filter = one("[data-filter]");
if (filter) {
  const cards = all("[data-cards] > li");
  const show = () => {
    const { q, family, verdict } = Object.fromEntries(new FormData(filter));
    const words = q.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const card of cards) {
      const { text, family: of, verdict: found } = card.dataset;
      card.hidden = !(
        words.every((word) => text.includes(word)) && [of, ""].includes(family) && [found, ""].includes(verdict)
      );
      count += !card.hidden;
    }
    one("[data-count]").textContent = count === 1 ? "1 method" : `${count} methods`;
    one("[data-empty]").hidden = count > 0;
    const given = new URLSearchParams(Object.entries({ q, family, verdict }).filter(([, value]) => value));
    history.replaceState(null, "", given.size ? `?${given}` : location.pathname);
  };
  filter.addEventListener("input", show);
  filter.addEventListener("submit", (event) => {
    event.preventDefault();
    show();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.target.closest("input, textarea, select")) {
      event.preventDefault();
      filter.elements.q.focus();
    }
  });
  if (new FormData(filter).get("q")) show(); // the browser may have filled the form after going back
}

// Comparing takes two runs.
for (const form of all("[data-compare]")) {
  const button = form.querySelector("[data-compare-button]");
  const boxes = all("input[type=checkbox]", form);
  const count = () => {
    const chosen = boxes.filter((box) => box.checked).length;
    button.hidden = boxes.length < 2;
    button.disabled = chosen < 2;
    button.textContent = chosen < 2 ? "Compare: choose two or more" : `Compare ${chosen} runs`;
  };
  form.addEventListener("change", count);
  count();
}

// Progress as it comes. When it ends, the page is loaded again: with the verdict, or with what there is to do.
for (const section of all("[data-live]")) {
  if (!section.dataset.live) continue;
  const source = new EventSource(section.dataset.live);
  source.addEventListener("live", (event) => {
    const focused = section.contains(document.activeElement);
    section.innerHTML = JSON.parse(event.data); // rendered and escaped by the server
    if (focused) one("main").focus({ preventScroll: true });
  });
  source.addEventListener("end", () => {
    source.close();
    location.reload();
  });
}
