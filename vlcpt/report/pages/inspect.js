"use strict";
// Documents and pictures lie in the page as blocks of lines that the browser does not look into. A document's line
// is read, and its text put in place as text, when it comes near the window. Its heading is there from the start, in
// a block that is laid out only when it comes near. So a page of 10,000 with a picture each opens in a second or two.
(() => {
  const $ = (id) => document.getElementById(id);
  const { sources, index, nats: hasNats, block: blockSize } = JSON.parse($("data-index").textContent);
  // Only the last block is kept as lines: to cut one takes less than a millisecond, to keep all twice the memory.
  const linesOf = (name) => {
    let place = -1, lines = [];
    return (at) => {
      if (Math.floor(at / blockSize) !== place) {
        place = Math.floor(at / blockSize);
        lines = $(`data-${name}-${place}`).textContent.split("\n");
      }
      return lines[at % blockSize];
    };
  };
  const documentLine = linesOf("documents"), picture = linesOf("pictures");
  const list = $("documents");
  const inWords = new Intl.NumberFormat("en-US");
  const number = (value) => inWords.format(value);
  const many = (count, what) => `${number(count)} ${what}${count === 1 ? "" : "s"}`;

  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.append(text);
    return element;
  };
  const svg = (tag, values) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(values)) element.setAttribute(key, value);
    return element;
  };

  // Controls but for tab and newline, characters without width, and those that turn the direction of reading.
  const unseen = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff\u{e0000}-\u{e007f}]/gu;
  const putText = (into, text, marksNewlines) => {
    const plain = (part) => {
      if (!marksNewlines) { into.append(part); return; }
      part.split("\n").forEach((line, at) => {
        if (at) { into.append(make("span", "newline", "⏎"), "\n"); }
        into.append(line);
      });
    };
    let done = 0;
    for (const found of text.matchAll(unseen)) {
      plain(text.slice(done, found.index));
      const code = found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      const shown = make("span", "u", `U+${code}`);
      shown.dataset.code = code;
      into.append(shown);
      done = found.index + found[0].length;
    }
    plain(text.slice(done));
  };
  const shownText = (tag, name, text) => { const element = make(tag, name); putText(element, text, false); return element; };

  const weightClass = (weight) => (weight <= 0.5 ? "low" : weight < 1 ? "mid" : weight === 1 ? "one" : weight <= 2 ? "high" : "top");
  const natsClass = (value) => (value < -0.05 ? "n-" : value < 0.05 ? "n0" : value < 0.25 ? "n1" : value < 1 ? "n2" : value < 2.5 ? "n3" : "n4");

  // The text of a document, token by token.
  const body = (found, at) => {
    const into = make("div", "text");
    into.dir = "auto";
    let place = 0;
    const chip = (text, name) => { const one = make("span", name, text); into.append(one); return one; };
    const run = (kind, text, lengths, weight) => {
      const piece = make("span", kind === "t" ? `t ${weightClass(weight)}` : kind);
      let done = 0;
      for (const [code, long] of lengths.matchAll(/\((\d+)\)|./g)) {
        const length = long ? +long : parseInt(code, 36);
        const token = make("span", "w");
        if (kind === "t" && found.nats) {
          const value = found.nats[place++];
          if (value !== undefined) {
            token.classList.add(natsClass(value));
            token.title = `${value.toFixed(2)} nats from its image`;
          }
        }
        putText(token, text.slice(done, done + length), kind === "t");
        done += length;
        piece.append(token);
      }
      into.append(piece);
      if (kind === "t" && weight !== 1) chip(`×${+weight.toPrecision(3)}`, "times");
    };
    for (const piece of found.pieces) {
      const [kind, one, two, three] = piece;
      if (kind === "m") into.append(mediumChip(found.media[one], one, at, two));
      else if (kind === "p") {
        const mark = chip("", "part");
        mark.append(make("span", "scissors", one > 1 ? "✂" : ""), ` part ${one} of ${found.parts} · ${many(two, "token")}`);
      } else if (kind === "e") chip("⌇", "e").title = "A span's edge is inside a token here: the text is cut, as it would not be at inference.";
      else if (kind === "o") chip(`┊ ${many(one, "token")} trimmed`, "trim").title = "After the last target of a part, or in a part without one: these cannot reach the loss.";
      else if (kind === "k") {
        const token = make("span", `k${two > 0 ? ` t ${weightClass(two)}` : ""}${three ? " d" : ""}`, one);
        if (two > 0 && found.nats) { const value = found.nats[place++]; if (value !== undefined) token.classList.add(natsClass(value)); }
        into.append(token);
      } else run(kind, one, two, three);
    }
    if (found.more) chip(`… ${many(found.more, "more token")}, not on this page`, "trim");
    return into;
  };

  const label = (medium, order) => `${medium.kind} ${order + 1}`;
  const shownPicture = (at, name) => {
    const image = make("img");
    image.decoding = "async";
    image.src = picture(at);
    image.alt = name;
    return image;
  };
  const mediumChip = (medium, order, at, isTrimmed) => {
    const link = make("a", `chip${isTrimmed ? " d" : ""}${medium.error ? " broken" : ""}`);
    link.href = `#d${at}m${order}`;
    if (medium.pictures && medium.pictures.length) link.append(shownPicture(medium.pictures[0], "")); else link.append("▦ ");
    link.append(`${label(medium, order)} · ${many(medium.tokens, "token")}`);
    return link;
  };
  const figure = (medium, order, at, total) => {
    const element = make("figure", "medium");
    element.id = `d${at}m${order}`;
    if (medium.pictures && medium.pictures.length) {
      const strip = make("div", medium.pictures.length > 1 ? "frames" : "frame");
      strip.append(...medium.pictures.map((at) => shownPicture(at, `${label(medium, order)}: ${medium.name}`)));
      element.append(strip);
    } else element.append(make("div", "frame none", medium.error ? "cannot be decoded" : "no picture on this page"));
    const caption = make("figcaption");
    const cost = make("div", "cost");
    cost.append(make("b", "", label(medium, order)), make("b", "num", many(medium.tokens, "token")));
    const bar = svg("svg", { class: "bar thin", "aria-hidden": "true" });
    bar.append(svg("rect", { class: "k-media", width: `${(100 * medium.tokens) / Math.max(total, 1)}%`, height: "100%" }));
    caption.append(cost, bar, shownText("div", "note name", medium.name));
    const size = `${medium.size} px → ${medium.grid} tokens${medium.frames ? ` · ${medium.frames}` : ""}`;
    caption.append(make("div", "note num", size));
    if (medium.error) caption.append(shownText("div", "message bad", medium.error));
    element.append(caption);
    return element;
  };

  const shareBar = (counts) => {
    const parts = Object.entries(counts).filter(([, count]) => count > 0);
    const total = parts.reduce((sum, [, count]) => sum + count, 0);
    const bar = svg("svg", { class: "bar mini", role: "img", "aria-label": parts.map(([name, count]) => `${name} ${number(count)}`).join(", ") });
    let start = 0;
    for (const [name, count] of parts) {
      for (const layer of [`fill k-${name}`, `over o-${name}`]) {
        const rect = svg("rect", { class: layer, x: `${(100 * start) / total}%`, width: `${(100 * count) / total}%`, height: "100%" });
        const title = svg("title", {});
        title.textContent = `${name}: ${number(count)}`;
        rect.append(title);
        bar.append(rect);
      }
      start += count;
    }
    return bar;
  };

  const filled = new Set();
  const read = (at) => JSON.parse(documentLine(at));
  const fill = (at) => {
    if (filled.has(at)) return;
    filled.add(at);
    const found = read(at);
    const article = articles[at];
    const facts = make("p", "facts note num");
    const counts = found.counts;
    const said = [sources[index[at][1]][0], found.place !== found.name ? found.place : "", many(found.tokens, "token")];
    if (counts.targets !== undefined) said.push(`${many(counts.targets, "target")} (${Math.round((100 * counts.targets) / Math.max(found.tokens, 1))}%)`);
    if (found.parts > 1) said.push(`${found.parts} parts`);
    putText(facts, said.filter((one) => one).join(" · "), false);
    article.append(facts);
    if (found.tokens) article.append(shareBar(counts));
    if (found.error) {
      const message = make("p", `message ${found.error.stops ? "bad" : ""}`);
      message.append(make("b", "", found.error.stops ? "Training would stop here. " : "Not used. "));
      putText(message, found.error.text, false);
      article.append(message);
    } else if (found.tokens && !found.parts) article.append(make("p", "message", "Not used: no token of it is a target."));
    if (found.left_out) article.append(make("p", "message plain", "Its text is not on this page; see the note at the top."));
    const columns = make("div", found.media.length > 3 ? "columns many" : found.media.length ? "columns" : "");
    if (found.pieces.length) columns.append(body(found, at));
    if (found.media.length) {
      const aside = make("div", "media");
      aside.setAttribute("role", "group");
      aside.setAttribute("aria-label", "Pictures");
      found.media.forEach((medium, order) => aside.append(figure(medium, order, at, found.tokens)));
      columns.append(aside);
    }
    article.append(columns);
  };

  // All articles are there from the start, with their heading, so that a screen reader knows.
  const articles = index.map(([name, , , flags], at) => {
    const article = make("article", `doc panel${flags & 1 ? " problem" : ""}`);
    article.id = `d${at}`;
    article.tabIndex = -1;
    const heading = make("h3");
    heading.append(make("span", "order num", `${number(at + 1)} `));
    putText(heading, name, false);
    article.append(heading);
    return article;
  });
  const whenNear = (act) => new IntersectionObserver((entries, observer) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) { observer.unobserve(target); act(target); }
    }
  }, { rootMargin: "900px 0px" });
  const nearDocuments = whenNear((article) => fill(+article.id.slice(1)));
  // To watch all articles would cost each frame; those of a block that is not near are not laid out either.
  const nearBlocks = whenNear((block) => [...block.children].forEach((article) => nearDocuments.observe(article)));
  let shown = [];
  let current = -1;
  // Blocks are made anew: the browser remembers how high one was, which is wrong once other documents are in it.
  const arrange = (numbers) => {
    shown = numbers;
    current = -1;
    nearBlocks.disconnect();
    const all = document.createDocumentFragment();
    for (let first = 0; first < shown.length; first += blockSize) {
      const block = make("div", "block");
      block.append(...shown.slice(first, first + blockSize).map((at) => articles[at]));
      block.style.setProperty("--documents", block.childElementCount);
      nearBlocks.observe(block);
      all.append(block);
    }
    list.replaceChildren(all);
  };
  arrange(articles.map((_, at) => at));
  shown.slice(0, 2).forEach(fill);

  // Search and filters.
  let texts = null;
  const searched = () => texts ?? (texts = index.map((_, at) => {
    const found = read(at);
    const words = found.pieces.filter(([kind]) => "xtdk".includes(kind)).map(([, text]) => text).join("");
    const names = found.media.map((medium) => medium.name).join("\n");
    return `${found.name}\n${found.place}\n${names}\n${found.error ? found.error.text : ""}\n${words}`.toLowerCase();
  }));
  const search = $("search"), filter = $("filter"), source = $("source");
  const apply = () => {
    const words = search.value.toLowerCase(), flags = +filter.value, only = source ? +source.value : -1;
    const fits = ([, from, , has], at) => (!flags || has & flags) && (only < 0 || from === only) && (!words || searched()[at].includes(words));
    arrange(articles.flatMap((_, at) => (fits(index[at], at) ? [at] : [])));
    $("found").textContent = shown.length === articles.length ? "" : `${number(shown.length)} of ${many(articles.length, "document")}`;
    $("nothing").hidden = shown.length > 0;
    requestAnimationFrame(() => { shown.slice(0, 8).forEach(fill); highlight(words); });
  };
  // Without touching the document: a match may begin in one token and end in another.
  const highlight = (words) => {
    if (!window.CSS || !CSS.highlights) return;
    CSS.highlights.delete("found");
    if (!words) return;
    const ranges = [];
    for (const at of shown) {
      if (!filled.has(at)) continue;
      const walker = document.createTreeWalker(articles[at], NodeFilter.SHOW_TEXT);
      const nodes = [], starts = [];
      let text = "";
      for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        if (node.parentElement.closest(".times, .part, .trim, .e, .newline, .chip")) continue;
        nodes.push(node); starts.push(text.length); text += node.data;
      }
      const low = text.toLowerCase();
      if (low.length !== text.length) continue;
      const nodeAt = (place) => { let a = 0, b = starts.length - 1; while (a < b) { const c = (a + b + 1) >> 1; if (starts[c] <= place) a = c; else b = c - 1; } return a; };
      for (let place = low.indexOf(words); place >= 0 && ranges.length < 2000; place = low.indexOf(words, place + words.length)) {
        const range = new Range(), first = nodeAt(place), last = nodeAt(place + words.length - 1);
        range.setStart(nodes[first], place - starts[first]);
        range.setEnd(nodes[last], place + words.length - starts[last]);
        ranges.push(range);
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  };
  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, 150); });
  filter.addEventListener("change", apply);
  if (source) source.addEventListener("change", apply);
  addEventListener("scroll", () => { if (search.value) { clearTimeout(waiting); waiting = setTimeout(() => highlight(search.value.toLowerCase()), 200); } }, { passive: true });

  // Moving about.
  // What lies above gets its height only now that it comes near. Until it has, the element is kept in place.
  let held = null;
  const keep = (element, block, frames) => {
    if (element !== held || !frames) return;
    element.scrollIntoView({ block });
    requestAnimationFrame(() => keep(element, block, frames - 1));
  };
  const hold = (element, block) => { held = element; keep(element, block, 20); };
  for (const name of ["wheel", "touchmove", "pointerdown", "keydown"]) addEventListener(name, () => { held = null; }, { passive: true, capture: true });
  const reach = (at) => {
    // Those around it first: their heights decide where it lies.
    const place = shown.indexOf(at);
    shown.slice(Math.max(0, place - 2), place + 4).forEach(fill);
    hold(articles[at], "start");
    articles[at].focus({ preventScroll: true });
  };
  const move = (step) => {
    if (!shown.length) return;
    const top = 90;
    if (current < 0 || current >= shown.length) {
      const isBelow = (element) => element.getBoundingClientRect().bottom > top;
      // The block first: what is inside one that is not near has no place until it is asked for.
      const block = [...list.children].findIndex(isBelow);
      const article = block < 0 ? undefined : [...list.children[block].children].find(isBelow);
      const first = article ? shown.indexOf(+article.id.slice(1)) : -1;
      current = first < 0 ? 0 : step > 0 && article.getBoundingClientRect().top > top ? first : first + step;
    } else current += step;
    current = Math.min(Math.max(current, 0), shown.length - 1);
    reach(shown[current]);
  };
  $("next").addEventListener("click", () => move(1));
  $("previous").addEventListener("click", () => move(-1));
  addEventListener("wheel", () => { current = -1; }, { passive: true });
  const follow = () => {
    const found = /^#d(\d+)(m\d+)?$/.exec(location.hash);
    if (!found || !articles[+found[1]]) return;
    select("documents");
    if (!articles[+found[1]].isConnected) { search.value = ""; filter.value = "0"; if (source) source.value = "-1"; apply(); }
    fill(+found[1]);
    const medium = found[2] && $(location.hash.slice(1));
    if (medium) hold(medium, "center");
    else { current = shown.indexOf(+found[1]); reach(+found[1]); }
  };
  addEventListener("hashchange", follow);

  // Packs.
  const select = (name) => {
    if (!$("packs")) return;
    for (const one of ["documents", "packs"]) {
      $(one).hidden = one !== name;
      $(`tab-${one}`).setAttribute("aria-selected", String(one === name));
      $(`tab-${one}`).tabIndex = one === name ? 0 : -1;
    }
    document.body.classList.toggle("at-packs", name === "packs");
    $("nothing").hidden = name === "packs" || shown.length > 0;
    if (name === "packs") fillPacks();
  };
  const fillPacks = () => {
    const into = $("pack-list"), packs = $("data-packs").textContent;
    if (!into || !packs || into.childElementCount) return;
    packs.split("\n").forEach((line, at) => {
      const { rows, length } = JSON.parse(line);
      const used = rows.reduce((sum, row) => sum + row[3], 0);
      const article = make("article", "pack panel");
      const heading = make("h3");
      heading.append(make("span", "order num", `pack ${number(at + 1)} `), `${Math.round((1000 * used) / length) / 10}% full`);
      const bar = svg("svg", { class: "bar", role: "img", "aria-label": `${number(used)} of ${many(length, "token")}, ${many(rows.length, "document")}` });
      const body = make("ol", "pack-rows");
      let start = 0;
      rows.forEach(([found, name, from, tokens, targets, media, isLater], order) => {
        const rect = svg("rect", { class: `c${(from % 6) + 1} ${order % 2 ? "odd" : ""}`, x: `${(100 * start) / length}%`, width: `${(100 * tokens) / length}%`, height: "100%" });
        const title = svg("title", {});
        title.textContent = `${name}: ${number(tokens)} tokens`;
        rect.append(title);
        if (start) bar.append(rect, svg("rect", { class: "gap", x: `${(100 * start) / length}%`, width: "1.5", height: "100%" })); else bar.append(rect);
        start += tokens;
        const item = make("li");
        const shownName = shownText(found >= 0 ? "a" : "span", "", found >= 0 ? index[found][0] : name);
        if (found >= 0) shownName.href = `#d${found}`;
        const key = svg("svg", { class: "key", "aria-hidden": "true" });
        key.append(svg("rect", { class: `c${(from % 6) + 1}`, width: "100%", height: "100%" }));
        const facts = shownText("span", "note num", ` ${sources[from][0]} · ${many(tokens, "token")}, ${many(targets, "target")}${media ? `, ${number(media)} of media` : ""}${isLater ? " · a later part" : ""}`);
        item.append(key, shownName, facts);
        body.append(item);
      });
      article.append(heading, bar, body);
      into.append(article);
    });
  };
  if ($("packs")) {
    for (const one of ["documents", "packs"]) {
      $(`tab-${one}`).addEventListener("click", () => select(one));
      $(`tab-${one}`).addEventListener("keydown", (event) => {
        if (!event.key.startsWith("Arrow")) return;
        const other = one === "packs" ? "documents" : "packs";
        event.preventDefault();
        select(other);
        $(`tab-${other}`).focus();
      });
    }
    select("documents");
  }

  // Switches and keys.
  const toggle = (id, name) => {
    const button = $(id);
    if (!button) return;
    const on = document.body.classList.toggle(name);
    button.setAttribute("aria-pressed", String(on));
  };
  $("tokens").addEventListener("click", () => toggle("tokens", "by-token"));
  if (hasNats) {
    document.body.classList.add("by-nats");
    $("reliance").addEventListener("click", () => toggle("reliance", "by-nats"));
  }
  const help = $("help");
  $("help-button").addEventListener("click", () => help.showModal());
  const keys = {
    j: () => move(1), n: () => move(1), k: () => move(-1), p: () => move(-1),
    "/": () => { scrollTo({ top: scrollY }); search.focus(); search.select(); },
    "?": () => (help.open ? help.close() : help.showModal()),
    t: () => toggle("tokens", "by-token"),
    r: () => toggle("reliance", "by-nats"),
    b: () => $("packs") && select($("packs").hidden ? "packs" : "documents"),
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (event.target === search) {
      if (event.key === "Escape") { search.value = ""; apply(); search.blur(); }
      if (event.key === "Enter" && shown.length) { search.blur(); current = 0; reach(shown[0]); }
      return;
    }
    if (event.target.closest?.("input, select, textarea")) return;
    const action = keys[event.key];
    if (action) { event.preventDefault(); action(); }
  });

  // What is copied is the text: marks are left out, and characters shown by number are themselves.
  document.addEventListener("copy", (event) => {
    const selection = getSelection();
    if (selection.isCollapsed || !selection.rangeCount) return;
    const range = selection.getRangeAt(0);
    const within = (range.commonAncestorContainer.closest ? range.commonAncestorContainer : range.commonAncestorContainer.parentElement);
    if (!within.closest(".text")) return;
    const part = range.cloneContents();
    part.querySelectorAll(".times, .part, .trim, .e, .newline, .chip").forEach((mark) => mark.remove());
    part.querySelectorAll(".u").forEach((one) => { one.textContent = String.fromCodePoint(parseInt(one.dataset.code, 16)); });
    event.clipboardData.setData("text/plain", part.textContent);
    event.preventDefault();
  });
  addEventListener("beforeprint", () => shown.slice(0, 300).forEach(fill));
  follow();
  document.documentElement.dataset.ready = "true";
})();
