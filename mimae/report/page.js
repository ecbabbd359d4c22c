"use strict";
// Values under the pointer, or one after another by the arrow keys; the pictures' slider. The page is whole without it.
for (const figure of document.querySelectorAll(".plot")) {
  const area = figure.querySelector(".area"), cursor = figure.querySelector(".cursor");
  const readout = figure.querySelector(".readout");
  const data = JSON.parse(figure.querySelector("script").textContent);
  const xs = data.points ? data.points.x : data.lines[0].x;
  const across = x => (x - data.x.low) / (data.x.high - data.x.low);
  const up = y => data.y.log
    ? Math.log(y / data.y.low) / Math.log(data.y.high / data.y.low)
    : (y - data.y.low) / (data.y.high - data.y.low);
  const shown = y => y === null ? "–" : Number(y.toPrecision(4)).toLocaleString("en");
  let place = -1;
  const nearest = (list, x) => list.reduce((best, value, i) =>
    value !== null && (best < 0 || Math.abs(value - x) < Math.abs(list[best] - x)) ? i : best, -1);
  const show = next => {
    place = Math.max(0, Math.min(xs.length - 1, next));
    cursor.hidden = false;
    cursor.style.left = `${100 * across(xs[place])}%`;
    if (data.points) {
      const { names, x, y } = data.points;
      readout.textContent = `${names[place]}: input ${shown(x[place])}, shared ${shown(y[place])} nats`;
      return;
    }
    const at = data.x.names ? data.x.names[place] : Math.round(xs[place] * 100) / 100;
    const values = data.lines.map(line => {
      const value = line.y[line.x === xs ? place : nearest(line.x, xs[place])];
      return data.lines.length > 1 ? `${line.label} ${shown(value)}` : shown(value);
    });
    readout.textContent = `${data.x.label} ${at.toLocaleString("en")}: ${values.join(", ")}`;
  };
  area.addEventListener("pointermove", event => {
    const box = area.getBoundingClientRect();
    const left = (event.clientX - box.left) / box.width, top = 1 - (event.clientY - box.top) / box.height;
    if (!data.points) return show(nearest(xs, data.x.low + left * (data.x.high - data.x.low)));
    const far = i => Math.hypot((across(xs[i]) - left) * box.width, (up(data.points.y[i]) - top) * box.height);
    show(xs.reduce((best, _, i) => far(i) < far(best) ? i : best, 0));
  });
  area.addEventListener("keydown", event => {
    const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: xs.length - 1 };
    if (event.key in moves) { event.preventDefault(); show(moves[event.key]); }
  });
  area.addEventListener("pointerleave", () => { cursor.hidden = true; });
}
for (const slides of document.querySelectorAll(".slides")) {
  const slider = slides.querySelector("input"), images = slides.querySelectorAll("img");
  slider?.addEventListener("input", () => {
    images.forEach((image, i) => { image.hidden = i !== Number(slider.value); });
    slides.querySelector("output").textContent = images[slider.value].dataset.step;
    slider.setAttribute("aria-valuetext", `step ${images[slider.value].dataset.step}`);
  });
}
