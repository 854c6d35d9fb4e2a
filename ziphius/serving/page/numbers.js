// Numbers as people read them.

/** A probability from its logarithm, as "97 %", "3.1 %" or "< 0.1 %". */
export function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  if (!Number.isFinite(share)) return "–";
  if (share < 0.1) return "< 0.1 %";
  if (share > 99.9 && share < 100) return "> 99.9 %";
  return `${share < 9.95 || (share > 99 && share < 100) ? share.toFixed(1) : Math.round(share)} %`;
}

/** Milliseconds as "0.21 s", "3.2 s", "48 s" or "2 min 5 s". */
export function seconds(ms) {
  const s = Math.max(0, ms) / 1000;
  if (s < 0.995) return `${s.toFixed(2)} s`;
  if (s < 9.95) return `${s.toFixed(1)} s`;
  if (s < 59.5) return `${Math.round(s)} s`;
  const whole = Math.round(s);
  return `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/** A rate with a sensible number of digits. */
export function rate(perSecond) {
  return perSecond < 9.95 ? perSecond.toFixed(1) : String(Math.round(perSecond));
}

/** A count with thin spaces between thousands; "1 token", "12 000 tokens". */
export function count(n, one, many = `${one}s`) {
  const digits = String(n).replace(/\B(?=(\d{3})+$)/g, "\u202f");
  return `${digits} ${n === 1 ? one : many}`;
}

/** Which heading of the side list a moment belongs under. */
export function day(moment, now = Date.now()) {
  const start = (t) => new Date(t).setHours(0, 0, 0, 0);
  const days = Math.round((start(now) - start(moment)) / 86_400_000);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  if (days < 7) return "This week";
  return new Date(moment).toLocaleDateString(undefined, { month: "long", year: "numeric" });
}
