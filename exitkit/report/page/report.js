"use strict";
// What is shown follows from two numbers: the method, and the place of the slider among its thresholds.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const method = element("method"), slider = element("tau");
  // As Python rounds, so that a number is the same wherever it stands on the page.
  const fixed = (value, digits) => value.toLocaleString("en-US", { minimumFractionDigits: digits,
    maximumFractionDigits: digits, roundingMode: "halfEven", useGrouping: false });
  const percent = (share, digits) => fixed(100 * share, digits) + "%";
  const sum = (values) => values.reduce((total, value) => total + value, 0);

  function make(tag, text, attributes) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    return Object.assign(made, attributes);
  }

  function showNumbers(chosen, at) {
    const accuracy = chosen.right[at] / data.samples, cost = chosen.cost[at];
    element("threshold").textContent = String(chosen.thresholds[at]);
    element("accuracy").textContent = percent(accuracy, 2);
    element("interval").textContent = chosen.interval[at].map((share) => percent(share, 1)).join(" to ");
    element("cost").textContent = percent(cost, 1);
    element("speedup").textContent = fixed(1 / cost, 2) + "×";
    element("timed").hidden = !chosen.milliseconds;
    if (chosen.milliseconds) element("time").textContent = fixed(speedupByTime(chosen, at), 2) + "×";
    slider.setAttribute("aria-valuetext", `τ ${element("threshold").textContent}`);
    const cursor = document.querySelector("#curve-cursor use");
    cursor.setAttribute("x", data.x[0] + cost * data.x[1]);
    cursor.setAttribute("y", data.y[0] + accuracy * data.y[1]);
  }

  // The time of the backbone without exits, over that of each stage times the share of the samples that enter it.
  function speedupByTime(chosen, at) {
    let entering = data.samples, spent = 0;
    chosen.milliseconds.forEach((time, stage) => {
      spent += time * entering / data.samples;
      entering -= chosen.exits[at][stage];
    });
    return chosen.backbone_milliseconds / spent;
  }

  function showExits(chosen, at) {
    const rows = chosen.exits[at].map((count, exit) => {
      const row = make("tr"), share = count / data.samples, bar = make("td");
      row.append(make("th", chosen.names[exit].replaceAll(".", ".\u200b"), { scope: "row" }), make("td", percent(chosen.costs[exit], 1)));
      row.append(make("td", percent(chosen.accuracies[exit], 1)), make("td", percent(share, 1)), bar);
      const drawn = make("div", undefined, { className: "bar" });
      drawn.style.width = percent(share, 2);
      bar.append(drawn);
      return row;
    });
    document.querySelector("#exits tbody").replaceChildren(...rows);
    const promised = chosen.promised && at === chosen.start;
    element("command").textContent = chosen.command + (promised ? "" : ` --threshold ${chosen.thresholds[at]}`);
  }

  function showConfusion(chosen, at) {
    const heading = make("tr"), classes = data.classes, body = make("tbody"), head = make("thead");
    head.append(heading);
    if (data.matrix) {
      heading.append(make("th", "label ↓ answer →", { scope: "col" }));
      heading.append(...classes.map((name) => make("th", name, { scope: "col", className: "upright" })));
      classes.forEach((name, label) => {
        const counts = chosen.confusion[at].slice(label * classes.length, (label + 1) * classes.length);
        const row = make("tr"), total = Math.max(1, sum(counts));
        row.append(make("th", name, { scope: "row" }), ...counts.map((count) => {
          const cell = make("td", count);
          cell.style.background = `color-mix(in srgb, var(--accent) ${(60 * count / total).toFixed(0)}%, transparent)`;
          return cell;
        }));
        body.append(row);
      });
    } else {
      heading.append(...["label", "answer", "samples"].map((name) => make("th", name, { scope: "col" })));
      for (const [label, answer, count] of chosen.confusion[at]) {
        const row = make("tr");
        row.append(make("th", classes[label], { scope: "row" }), make("td", classes[answer]), make("td", count));
        body.append(row);
      }
    }
    element("confusion").replaceChildren(head, body);
  }

  function showGallery(chosen, at) {
    if (!element("early")) return;
    const last = chosen.names.length - 1;
    const seen = chosen.gallery.map((sample, kept) => {
      const found = sample.passes.findIndex((from) => at < from), exit = found < 0 ? last : found;
      return { ...sample, ...data.pictures[kept], exit, answer: sample.answers[exit], right: sample.answers[exit] === sample.label };
    }).sort((one, two) => one.exit - two.exit);
    const groups = {
      early: seen.filter((sample) => sample.exit < last && sample.right),
      late: seen.filter((sample) => sample.exit === last),
      wrong: seen.filter((sample) => sample.exit < last && !sample.right),
    };
    for (const [id, samples] of Object.entries(groups)) {
      const shown = samples.slice(0, 12).map((sample) => picture(sample, chosen));
      element(id).replaceChildren(...(shown.length ? shown : [make("p", "None of the kept samples.")]));
    }
  }

  // The heading says already whether a sample left early and whether its answer is right.
  function caption(sample, chosen) {
    const last = chosen.names.length - 1, { label, answer, answers, exit } = sample, name = data.classes[label];
    const said = sample.right ? name : `${data.classes[answer]} instead of ${name}`;
    if (exit === last) return said;
    const backbone = answers[last] === label ? "the backbone is right" : answers[last] === answer ? "so says the backbone"
      : `the backbone says ${data.classes[answers[last]]}`;
    return `${said}, at ${chosen.names[exit]}` + (sample.right ? "" : `; ${backbone}`);
  }

  function picture(sample, chosen) {
    const figure = make("figure");
    if (sample.image) {
      const alt = `Sample ${sample.row}, ${data.classes[sample.label]}`;
      figure.append(make("img", undefined, { src: sample.image, alt, width: 96, height: 96 }));
    } else {
      figure.className = "text";
      figure.append(make("blockquote", sample.text));
    }
    figure.append(make("figcaption", caption(sample, chosen)));
    return figure;
  }

  function show() {
    const chosen = data.methods[method.value], at = Number(slider.value);
    for (const part of [showNumbers, showExits, showConfusion, showGallery]) part(chosen, at);
  }

  function changeMethod() {
    const chosen = data.methods[method.value];
    slider.max = chosen.thresholds.length - 1;
    slider.value = chosen.start;
    show();
  }

  element("controls").addEventListener("submit", (event) => event.preventDefault());
  method.addEventListener("change", changeMethod);
  slider.addEventListener("input", show);
  changeMethod();
})();
