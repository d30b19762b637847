/** What bounds the speed of an answer, in the reader's language. */

import type { Translate, Word } from '../i18n'

/** What the kernel says of the bound, and how that is said here. */
const BOUNDS: [RegExp, Word][] = [
  [/^bus to (?<device>[^,]+), (?<speed>.+)$/, 'boundBus'],
  [/^disk, (?<speed>.+)$/, 'boundDisk'],
  [/^memory of (?<device>[^,]+), (?<speed>.+)$/, 'boundMemory'],
  [/^RAM for CPU and buses, (?<speed>.+)$/, 'boundShared'],
  [/^matrix products on (?<device>.+)$/, 'boundProducts'],
  [/^launching kernels on (?<device>.+)$/, 'boundKernels'],
]

/** The bound in words; a bound that we do not know stays as it came. */
export function boundWords(t: Translate, text: string): string {
  for (const [pattern, word] of BOUNDS) {
    const groups = pattern.exec(text)?.groups
    if (groups) return t(word, groups)
  }
  return text
}
