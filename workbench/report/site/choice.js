// The choice, by the rules of `workbench recommend`. A figure is [value, low, high]; a limit is kept (0) where the whole
// interval keeps it, fails (3) where none of it does, and between them is undecided: likely (1), or not (2).
const data = JSON.parse($("choices").textContent), candidates = data.rows;
function judge(figure, limit, least) {
  if (limit === null) return 0;
  if (!figure) return 3;
  const sign = least ? -1 : 1, [value, low, high] = figure;
  const near = low === null ? sign * value : Math.min(sign * low, sign * high);
  const far = low === null ? Infinity : Math.max(sign * low, sign * high);
  return near > sign * limit ? 3 : far <= sign * limit ? 0 : sign * value <= sign * limit ? 1 : 2;
}

// [kind, value, slack], smaller is better: what is sure of a candidate, so that a bad measurement is no merit.
function sure(one, by) {
  if (by !== "speed") return one.sure[by];
  if (!one.speed) return [2, 0, 0];
  const least = one.speed[1] ?? one.speed[0];
  return [one.speed[1] === null ? 1 : 0, -least, least * data.alike];
}
const before = (a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2];
const behind = (a, b) => a[0] > b[0] || (a[0] === b[0] && a[1] > b[1] + b[2]);
function worse(by, one, other) {
  const a = sure(one, by), b = sure(other, by);
  if (a[0] === 2 || b[0] === 2) return a[0] > b[0];
  if (by === "speed") return (one.speed[2] ?? one.speed[0]) < -b[1];
  return by === "quality" ? one.worse.includes(candidates.indexOf(other)) : a[1] > b[1] + b[2];
}

// The best of a pool: those alike with the best by the first of four, of them by the second, and so on.
function settle(pool, order) {
  let tied;
  for (const by of order) {
    const best = pool.map(one => sure(one, by)).sort(before)[0];
    const near = pool.filter(one => !behind(sure(one, by), best));
    const kept = near.filter(one => !pool.some(other => worse(by, one, other)));
    pool = kept.length ? kept : near;
    tied ??= pool;
  }
  const ranks = (one, other) => order.reduce((sign, by) => sign || before(sure(one, by), sure(other, by)), 0);
  const choice = [...pool].sort(ranks)[0];
  return {choice, tied: tied.filter(one => one !== choice)};
}
function bestOf(pool, order) {
  const standing = Math.min(...pool.map(one => one.standing));
  return pool.length ? settle(pool.filter(one => one.standing === standing), order) : {tied: []};
}

const spoken = figure => figure[0].toFixed(1) + " tok/s" +
  (figure[1] === null ? "" : " (" + figure[1].toFixed(1) + " to " + figure[2].toFixed(1) + ")");
const told = one => [one.speed && spoken(one.speed), one.figures].filter(Boolean).join(", ");
function limit(now, name, factor = 1) {
  const value = parseFloat(now[name]);
  return isNaN(value) ? null : value * factor;
}
function choose(now) {
  const context = limit(now, "context"), fails = new Map();
  for (const one of candidates) {
    const point = one.points.find(point => point[0] >= (context ?? 0));
    one.speed = point ? point.slice(1) : null;
    const verdicts = {
      engine: now.on && now.on !== one.engine ? 3 : 0,
      memory: judge(one.memory, limit(now, "memory", 2 ** 30)),
      context: context !== null && !one.speed ? 3 : 0,
      speed: judge(one.speed, limit(now, "speed"), true),
      divergence: judge(one.divergence, limit(now, "divergence")),
    };
    one.standing = Math.max(...Object.values(verdicts));
    one.undecided = Object.keys(verdicts).filter(name => verdicts[name] === 1 || verdicts[name] === 2);
    for (const name in verdicts) if (verdicts[name] === 3) fails.set(name, (fails.get(name) ?? 0) + 1);
  }
  const fit = candidates.filter(one => one.standing < 3), order = data.orders[now.by];
  const {choice, tied} = bestOf(fit, order), second = bestOf(fit.filter(one => one !== choice), order).choice;
  const hope = fit.length ? settle(fit, order).choice : null;
  answer(choice, [
    choice?.undecided.length && `It is not known whether it keeps the limit of ${choice.undecided.join(" and ")}: ` +
      `measure again with \`workbench run RECIPE --again -v ${choice.variant} -b ${choice.engine}\`.`,
    ...(choice?.notes ?? []).map(note => "Note: " + note),
    tied.length && `As good by ${now.by}: ` + tied.map(one => one.name).join(", ") + ".",
    second && `Runner-up: ${second.name}, ${told(second)}.`,
    hope && hope !== choice && `${hope.name} would be chosen, were it known to keep the limit of ` +
      hope.undecided.join(" and ") + ".",
    `${fit.length} of ${candidates.length} fit` +
      [...fails].map(([name, many]) => `; ${many} fail by ${name}`).join("") + ".",
  ].filter(Boolean));
  const unfit = new Set(candidates.filter(one => one.standing === 3).map(one => one.id));
  for (const [mark, own] of marks) {
    mark.classList.toggle("unfit", own.every(id => unfit.has(id)));
    mark.classList.toggle("chosen", choice !== undefined && own.includes(choice.id));
  }
}
function answer(choice, lines) {
  const make = (tag, words, more) => Object.assign(document.createElement(tag), {textContent: words}, more);
  const name = choice ? make("a", choice.name, {href: "#" + choice.id}) : make("span", "Nothing fits.");
  const heading = make("p", "", {className: "chosen"});
  heading.append(name);
  const parts = [heading];
  if (choice) parts.push(make("p", told(choice)));
  if (choice) parts.push(choice.command ? make("pre", choice.command) : make("p", "Its engine has no server for it."));
  parts.push(...lines.map(words => make("p", words, {className: "soft"})));
  $("answer").replaceChildren(...parts);
  $("answer").querySelectorAll("pre").forEach(copiable);
}
