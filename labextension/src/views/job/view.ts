/**
 * A job at work: what it does, how far it is, how long it will take, and the plan that fills block by block.
 */

import { h, setText } from '../../dom'
import { formatSeconds } from '../../units'
import type { Shown, StateOf, Surroundings, View } from '../../view'
import type { Event, ProgressEvent } from '../../wire'
import { Clock } from '../clock'
import { BlockProgress } from './blocks'
import { JOB_CSS } from './css'
import { BlockPicture } from './picture'
import { LostNote } from '../lost'
import { PhaseBar, phaseName, phaseWords } from '../phase'
import { StopControl } from '../stop'

type State = StateOf<'job'>

export const jobView: View<State> = (state, surroundings) => new LiveJob(state, surroundings)

class LiveJob implements Shown<State> {
  private readonly title = h('span', { class: 'head-title' })
  private readonly phase = h('span', { class: 'job-phase' })
  private readonly time = h('span', { class: 'job-time num muted', role: 'timer', 'aria-live': 'off' })
  private readonly left = h('span', { class: 'job-left num' })
  private readonly now = h('span', { class: 'job-now muted' })
  private readonly lostNote = new LostNote()
  // A phase is said once: how far it is would be said without end.
  private readonly spoken = h('div', { class: 'visually-hidden job-spoken', role: 'status' })
  private readonly bar: PhaseBar
  private readonly picture: BlockPicture
  private readonly blocks = new BlockProgress()
  private readonly cancel: StopControl
  private readonly clock: Clock
  private last: ProgressEvent | null = null

  constructor(
    state: State,
    private readonly surroundings: Surroundings,
  ) {
    const { t } = surroundings
    this.bar = new PhaseBar(t)
    this.picture = new BlockPicture(t)
    this.cancel = new StopControl(surroundings, 'cancel', 'jobCancelling')
    this.clock = new Clock(this.time, elapsedS => this.tick(elapsedS))
    this.build()
    this.update(state)
    this.showProgress()
  }

  update(state: State): void {
    setText(this.title, state.title)
    this.blocks.setBlocks(state.plan?.blocks ?? [])
    this.picture.setPlan(state.plan)
    this.picture.show(this.blocks)
  }

  event(event: Event): void {
    if (this.lostNote.isShown) return
    if (event.type === 'hello') this.cancel.heard()
    if (event.type !== 'progress') return
    this.last = event
    this.blocks.take(event)
    this.clock.set(event.elapsed_s)
    this.showProgress()
  }

  lost(message: string): void {
    this.lostNote.show(message)
    this.blocks.rest()
    this.showProgress()
    this.left.textContent = ''
    this.cancel.end()
    this.clock.stop()
  }

  cleanup(): void {
    this.clock.stop()
  }

  private build(): void {
    const words = h('div', { class: 'head-words' }, this.title, this.phase, ' ', this.time)
    this.surroundings.root.append(
      h('style', {}, JOB_CSS),
      this.lostNote.element,
      h('div', { class: 'head' }, words, h('div', { class: 'head-tools' }, this.cancel.element)),
      this.bar.element,
      h('div', { class: 'job-foot' }, this.left, this.now),
      this.picture.element,
      this.spoken,
    )
  }

  private showProgress(): void {
    const { t } = this.surroundings
    const isLost = this.lostNote.isShown
    setText(this.phase, isLost ? t('phaseInterrupted') : phaseWords(this.last, t))
    setText(this.spoken, this.last && !isLost ? phaseName(this.last, t) : '')
    this.bar.element.hidden = isLost
    this.bar.show(this.last)
    setText(this.now, this.last?.detail && !isLost ? t('jobAtWork', { label: this.last.detail }) : '')
    this.picture.show(this.blocks)
  }

  private tick(elapsedS: number): void {
    setText(this.time, formatSeconds(elapsedS))
    const leftS = this.last?.left_s ? Math.max(1, this.last.left_s - this.clock.sinceS) : 0
    setText(this.left, leftS ? this.surroundings.t('phaseLeft', { time: about(leftS) }) : '')
  }
}

/** `12 s` for `12.4`: an estimate has no tenths. */
function about(seconds: number): string {
  return seconds < 59.5 ? `${Math.round(seconds)} s` : formatSeconds(seconds)
}
