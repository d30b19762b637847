/**
 * An answer while it comes: its text, where it is, how fast it is and why, and a way to stop it.
 *
 * When it is done the kernel shows the formatted answer in this place; this view never formats.
 */

import { h, replace, setText } from '../../dom'
import { formatSeconds } from '../../units'
import type { Shown, StateOf, Surroundings, View } from '../../view'
import type { AnswerEvent, Event } from '../../wire'
import { CopyControl } from './copy'
import { ANSWER_CSS } from './css'
import { figureElements, figures } from './figures'
import { placementBar } from './placement'
import { Sequence } from './sequence'
import { Spoken } from './spoken'
import { AnswerText } from './text'
import { Clock } from '../clock'
import { LostNote } from '../lost'
import { PhaseBar, phaseWords } from '../phase'
import { StopControl } from '../stop'

type State = StateOf<'answer'>

const BEGINNING_AT_MOST = 300
/** A kernel at work is heard more often than this, in seconds. */
const SILENT_S = 5

export const answerView: View<State> = (state, surroundings) => new LiveAnswer(state, surroundings)

class LiveAnswer implements Shown<State> {
  private readonly title = h('span', { class: 'head-title' })
  private readonly phase = h('span', { class: 'answer-phase' })
  private readonly time = h('span', { class: 'answer-time num muted', role: 'timer', 'aria-live': 'off' })
  private readonly note = h('p', { class: 'answer-note muted' })
  private readonly figures = h('div', { class: 'figures' })
  private readonly placement = h('div', { class: 'answer-placement' })
  private readonly lostNote = new LostNote()
  private readonly bar: PhaseBar
  private readonly text: AnswerText
  private readonly copy: CopyControl
  private readonly stop: StopControl
  private readonly clock: Clock
  private readonly spoken = new Spoken()
  private readonly sequence: Sequence
  private last: AnswerEvent | null = null
  private shownFigures = ''

  constructor(
    private state: State,
    private readonly surroundings: Surroundings,
  ) {
    const { send, t, view } = surroundings
    this.bar = new PhaseBar(t)
    this.text = new AnswerText(t('answerLabel', { model: state.model }), t)
    this.copy = new CopyControl(t, () => this.text.text, () => this.text.select())
    this.stop = new StopControl(surroundings, 'answerStop', 'answerStopping')
    this.sequence = new Sequence(() => send({ type: 'hello', view }))
    this.clock = new Clock(this.time, elapsedS => setText(this.time, formatSeconds(elapsedS)))
    this.build()
    this.showState()
    this.showProgress()
  }

  update(state: State): void {
    this.state = state
    this.showState()
    this.showProgress()
  }

  event(event: Event): void {
    if (this.lostNote.isShown) return
    if (event.type === 'hello') this.stop.heard()
    else if (event.type === 'answer') this.more(event)
  }

  lost(message: string): void {
    this.lostNote.show(message)
    this.showState()
    this.showProgress()
    this.stop.end()
    this.clock.stop()
    this.spoken.stop()
  }

  /** The view ends with its answer; an answer of which nothing was heard for long ended before. */
  cleanup(): void {
    if (this.last && this.clock.sinceS < SILENT_S) this.spoken.end(this.surroundings.t('answerDone'))
    else this.spoken.stop()
    this.clock.stop()
    this.copy.stop()
  }

  private build(): void {
    const words = h('div', { class: 'head-words' }, this.title, this.phase, ' ', this.time)
    const tools = h('div', { class: 'head-tools' }, this.copy.element, this.stop.element)
    this.surroundings.root.append(
      h('style', {}, ANSWER_CSS),
      this.lostNote.element,
      h('div', { class: 'head' }, words, tools),
      this.bar.element,
      this.text.element,
      this.note,
      h('div', { class: 'answer-foot' }, this.figures, this.placement),
      this.spoken.element,
    )
  }

  /** Take an event; text of a delta counts only when none is missing before it. */
  private more(event: AnswerEvent): void {
    const verdict = this.sequence.take(event)
    if (verdict === 'old') return
    if (verdict === 'whole') this.setText(event.text)
    else if (verdict === 'next') this.addText(event.text)
    this.last = event
    this.clock.set(event.elapsed_s)
    this.showProgress()
  }

  private addText(text: string): void {
    if (!this.state.streams_text) return
    this.text.append(text)
    this.spoken.add(text)
  }

  private setText(text: string): void {
    if (!this.state.streams_text) return
    const before = this.text.text
    // What was heard before a page was loaded again is not said twice; a beginning is.
    const isMore = before ? text.startsWith(before) : text.length <= BEGINNING_AT_MOST
    if (isMore) this.spoken.add(text.slice(before.length))
    else this.spoken.clear()
    this.text.set(text)
  }

  private showState(): void {
    const { t } = this.surroundings
    const { model, placement, streams_text: streams } = this.state
    setText(this.title, model)
    this.text.element.hidden = !streams
    this.copy.element.hidden = !streams
    this.note.hidden = streams || this.lostNote.isShown
    setText(this.note, streams ? '' : t('answerShownWhenDone'))
    replace(this.placement, placementBar(placement, t))
  }

  private showProgress(): void {
    const { t } = this.surroundings
    const isLost = this.lostNote.isShown
    setText(this.phase, isLost ? t('phaseInterrupted') : phaseWords(this.last, t))
    this.bar.element.hidden = isLost || this.last?.phase === 'generating'
    this.bar.show(this.last)
    const texts = figures(this.last, this.state.bound_by, t)
    if (texts.join() !== this.shownFigures) replace(this.figures, ...figureElements(texts))
    this.shownFigures = texts.join()
  }
}
