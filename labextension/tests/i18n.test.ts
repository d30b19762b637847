import { expect, test } from 'vitest'
import { LANGUAGES, pageLanguage, translator, WORDS, type Word } from '../src/i18n'
import { answerWords } from '../src/words/answer'
import { commonWords } from '../src/words/common'
import { machineWords } from '../src/words/machine'

const holes = (text: string) => new Set([...text.matchAll(/\{(\w+)\}/g)].map(match => match[1]))

test.each(Object.keys(WORDS) as Word[])('%s is said in every language, with the same values', word => {
  for (const language of LANGUAGES) {
    expect(WORDS[word][language].trim(), language).not.toBe('')
    expect(holes(WORDS[word][language]), language).toEqual(holes(WORDS[word].en))
  }
})

test('the page says the language, then the browser', () => {
  document.documentElement.lang = 'ja-JP'
  expect(pageLanguage()).toBe('ja')
  document.documentElement.lang = 'tlh'
  expect(pageLanguage()).toBe('en')
  document.documentElement.lang = ''
})

test('values go into the holes of a message, once', () => {
  expect(translator('en')('copied')).toBe('Copied')
})

test('Japanese words have one form: half-width signs in our files, and one word for one thing', () => {
  for (const [word, { ja }] of Object.entries({ ...commonWords, ...answerWords, ...machineWords })) {
    expect(ja, word).not.toMatch(/[（）：]|測定|進み具合/)
  }
})
