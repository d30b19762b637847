/** Where a model's weights are, as one thin bar with its words. */

import { h } from '../../dom'
import type { Translate, Word } from '../../i18n'
import { FILLS } from '../../theme'
import { formatPercent } from '../../units'

const KINDS: [string, Word][] = [
  ['gpu', 'answerKindGpu'],
  ['looked-up', 'answerKindLookedUp'],
  ['ram-streamed', 'answerKindStreamed'],
  ['ram', 'answerKindCpu'],
  ['kept', 'answerKindKept'],
  ['disk', 'answerKindDisk'],
]

/** `60 % GPU · 25 % RAM streamed`, the fastest first; kinds that we do not know come last by their own name. */
export function placementBar(placement: Record<string, number>, t: Translate): HTMLElement | null {
  const shares = inOrder(placement)
  if (!shares.length) return null
  const words = new Map(KINDS.map(([kind, word]) => [kind, t(word)]))
  // Without a GPU there is nothing else that could compute what is in RAM.
  if (!placement['gpu'] && !placement['ram-streamed']) words.set('ram', t('answerKindRam'))
  const bar = h('span', { class: 'place-bar', 'aria-hidden': 'true' })
  const legend = h('span', { class: 'place-words' })
  for (const [kind, percent] of shares) {
    bar.append(h('span', { class: `place-part ${fillOf(kind)}`, '--part': String(percent) }))
    const share = t('answerShare', { share: formatPercent(percent / 100), kind: words.get(kind) ?? kind })
    legend.append(h('span', { class: 'place-word' }, h('span', { class: `place-swatch ${fillOf(kind)}` }), share))
  }
  return h('div', { class: 'place', role: 'group', 'aria-label': t('answerPlacement') }, bar, legend)
}

function inOrder(placement: Record<string, number>): [string, number][] {
  const known = KINDS.map(([kind]) => kind)
  const rank = (kind: string) => (known.includes(kind) ? known.indexOf(kind) : known.length)
  const shares = Object.entries(placement).filter(([, percent]) => percent > 0)
  return shares.sort(([one], [other]) => rank(one) - rank(other))
}

function fillOf(kind: string): string {
  return `fill-${(FILLS as readonly string[]).includes(kind) ? kind : 'other'}`
}
