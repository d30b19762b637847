/**
 * What a screen reader hears of an answer: whole sentences, and not more often than it can speak.
 *
 * The visible text is silent, for a live region that changes twenty times a second is noise.
 */

import { h } from '../dom'

const EVERY_MS = 3000
// An answer may come faster than speech: what is older than this is read in the text itself.
const CHARACTERS_AT_MOST = 600
const SENTENCE_END = /[.!?…]["'”’)\]]*\s|[。！？]["'”’)\]」』）]*|\n/g

export class Spoken {
  readonly element = h('div', { class: 'visually-hidden spoken', 'aria-live': 'polite' })
  private readonly timer: ReturnType<typeof setInterval>
  private pending = ''

  constructor() {
    this.timer = setInterval(() => this.speak(), EVERY_MS)
  }

  add(text: string): void {
    this.pending += text
  }

  /** Forget what was not said yet. */
  clear(): void {
    this.pending = ''
  }

  stop(): void {
    clearInterval(this.timer)
  }

  private speak(): void {
    const end = lastSentenceEnd(this.pending)
    const said = this.pending.slice(0, end).trim()
    this.pending = this.pending.slice(end)
    if (said) this.element.textContent = said.slice(-CHARACTERS_AT_MOST)
  }
}

function lastSentenceEnd(text: string): number {
  let end = 0
  for (const match of text.matchAll(SENTENCE_END)) end = match.index + match[0].length
  return end
}
