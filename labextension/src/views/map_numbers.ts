/** Counts and shares as people read them, in every language alike. */

/** `12345.6` as `12,346`, or `12,345.6` with a decimal. */
export function formatNumber(count: number, decimals = 0): string {
  const [whole = '', ...part] = count.toFixed(decimals).split('.')
  return [whole.replace(/\B(?=(\d{3})+$)/g, ','), ...part].join('.')
}

/** `97.4` as `97 %`. */
export function formatPercent(percent: number): string {
  return `${formatNumber(percent)} %`
}
