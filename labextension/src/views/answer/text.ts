/**
 * The text of an answer while it comes: appended as text, and followed while the reader is at its end.
 */

import { h } from '../../dom'
import type { Translate } from '../../i18n'
import { END } from '../../kept'

// Appending to a text node costs what it holds, so a node is left alone when it is long.
const NODE_AT_MOST = 20_000
const NEAR_PX = 24

export class AnswerText {
  readonly element: HTMLElement
  text = ''
  private readonly log: HTMLElement
  private readonly newest: HTMLElement
  private node = document.createTextNode('')
  private lastTop = 0

  constructor(label: string, t: Translate) {
    this.log = h('div', {
      class: 'answer-text', role: 'log', 'aria-live': 'off', 'aria-label': label, tabindex: 0, 'data-scrolls': END,
      onscroll: () => this.scrolled(),
    })
    this.newest = h('button', { type: 'button', class: 'newest', hidden: true, onclick: () => this.jump() }, t('answerNewest'))
    this.element = h('div', { class: 'answer-frame' }, this.log, this.newest)
    this.log.append(this.node)
  }

  append(text: string): void {
    if (!text) return
    this.text += text
    this.put(text)
    this.settle()
  }

  /** Put this in place of all there is. */
  set(text: string): void {
    if (text === this.text) return
    if (text.startsWith(this.text)) {
      this.append(text.slice(this.text.length))
      return
    }
    this.text = text
    this.node = document.createTextNode('')
    this.log.replaceChildren(this.node)
    this.put(text)
    this.settle()
  }

  /** Select the text, for hosts without a clipboard. */
  select(): void {
    this.log.focus({ preventScroll: true })
    // Other than a range, this reaches into a shadow root.
    getSelection()?.setBaseAndExtent(this.log, 0, this.log, this.log.childNodes.length)
  }

  /** Whether the reader is at the end, and stays there: also where the text stands in another place. */
  private get follows(): boolean {
    return this.log.dataset['scrolls'] === END
  }

  private set follows(isAtEnd: boolean) {
    this.log.dataset['scrolls'] = isAtEnd ? END : ''
    this.newest.hidden = isAtEnd
  }

  private put(text: string): void {
    for (const piece of pieces(text)) {
      if (this.node.length + piece.length > NODE_AT_MOST && this.node.length) {
        this.node = document.createTextNode(piece)
        this.log.append(this.node)
      } else this.node.appendData(piece)
    }
  }

  private settle(): void {
    if (this.follows) this.lastTop = this.log.scrollTop = this.log.scrollHeight
  }

  /** Going up by any distance leaves the end; coming near the end follows it again. */
  private scrolled(): void {
    const { scrollTop, scrollHeight, clientHeight } = this.log
    if (!this.log.isConnected) return // its place has gone, and with it where it was
    const left = scrollHeight - scrollTop - clientHeight
    if (left <= 2) this.follows = true
    else if (scrollTop < this.lastTop) this.follows = false
    else if (left <= NEAR_PX) this.follows = true
    this.lastTop = scrollTop
  }

  private jump(): void {
    this.follows = true
    this.settle()
    this.log.focus({ preventScroll: true })
  }
}

/** The text in lengths that fit a node; a character of two code units stays whole. */
function pieces(text: string): string[] {
  const found: string[] = []
  for (let start = 0; start < text.length;) {
    let end = Math.min(start + NODE_AT_MOST, text.length)
    if (end < text.length && isLowSurrogate(text.charCodeAt(end))) end -= 1
    found.push(text.slice(start, end))
    start = end
  }
  return found
}

function isLowSurrogate(code: number): boolean {
  return code >= 0xdc00 && code <= 0xdfff
}
