/** Bytes, seconds and rates as people read them: the same words as `llm_magic/units.py` (a test compares). */

const KIB = 1024
const UNITS: [string, number][] = [
  ['TiB', KIB ** 4],
  ['GiB', KIB ** 3],
  ['MiB', KIB ** 2],
]

/** `8589934592` as `8.0 GiB`: binary units, one decimal from MiB up. */
export function formatBytes(count: number): string {
  const sign = count < 0 ? '-' : ''
  const size = Math.abs(count)
  for (const [unit, factor] of UNITS) {
    if (size >= factor * 0.9995) return `${sign}${(size / factor).toFixed(1)} ${unit}`
  }
  return size >= KIB ? `${sign}${(size / KIB).toFixed(0)} KiB` : `${sign}${size.toFixed(0)} B`
}

/** `25.1e9` as `25.1 GB/s`: decimal units, as buses and disks are sold. */
export function formatBandwidth(bytesPerS: number): string {
  if (bytesPerS >= 99.95e9) return `${(bytesPerS / 1e9).toFixed(0)} GB/s`
  if (bytesPerS >= 0.9995e9) return `${(bytesPerS / 1e9).toFixed(1)} GB/s`
  return `${(bytesPerS / 1e6).toFixed(0)} MB/s`
}

/** `0.084` as `84 ms`, `3.21` as `3.2 s`, `75` as `1 min 15 s`. */
export function formatSeconds(seconds: number): string {
  if (seconds < 0.9995) return `${(seconds * 1e3).toFixed(0)} ms`
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`
  const whole = Math.round(seconds)
  const hours = Math.floor(whole / 3600)
  const minutes = Math.floor((whole % 3600) / 60)
  const pad = (n: number) => String(n).padStart(2, '0')
  return hours ? `${hours} h ${pad(minutes)} min` : `${minutes} min ${pad(whole % 60)} s`
}

/** `31.42` as `31.4 tok/s`; three significant digits below 100. */
export function formatRate(tokensPerS: number): string {
  if (tokensPerS >= 99.95) return `${tokensPerS.toFixed(0)} tok/s`
  return tokensPerS >= 0.995 ? `${tokensPerS.toFixed(1)} tok/s` : `${tokensPerS.toFixed(2)} tok/s`
}

/** `8030261248` as `8.03 B`: parameters and tokens. */
export function formatCount(count: number): string {
  for (const [unit, factor] of [['T', 1e12], ['B', 1e9], ['M', 1e6], ['K', 1e3]] as [string, number][]) {
    if (count >= factor * 0.9995) return `${Number((count / factor).toPrecision(3))} ${unit}`
  }
  return count.toFixed(0)
}

/** `165.2e12` as `165 TFLOPS`: dense floating-point operations per second. */
export function formatFlops(operationsPerS: number): string {
  for (const [unit, factor] of [['PFLOPS', 1e15], ['TFLOPS', 1e12]] as [string, number][]) {
    if (operationsPerS >= factor * 0.9995) return `${Number((operationsPerS / factor).toPrecision(3))} ${unit}`
  }
  return `${(operationsPerS / 1e9).toFixed(0)} GFLOPS`
}

/** `1412` as `1,412`, in every language. */
export function formatNumber(count: number): string {
  return Math.round(count).toLocaleString('en-US')
}

/** `0.274` as `27 %`: a share in whole percents. */
export function formatPercent(share: number): string {
  return `${(100 * share).toFixed(0)} %`
}
